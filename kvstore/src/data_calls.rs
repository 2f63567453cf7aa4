//! Put and get calls under way: a bound over all, of which a namespace may take as much as it leaves free for others.

use std::sync::Arc;

use kvstore_tiers::host::NamespaceId;
use parking_lot::Mutex;

use crate::caps;

/// See the head of this file.
pub struct DataCalls {
    state: Mutex<State>,
}

struct State {
    free: usize,
    /// Calls of each namespace, in the order of their numbers.
    of: Vec<usize>,
}

/// A call under way, until it is dropped.
pub struct DataCall {
    calls: Arc<DataCalls>,
    namespace: NamespaceId,
}

impl DataCalls {
    /// For so many namespaces.
    pub fn new(namespaces: usize) -> Arc<Self> {
        let state = State { free: caps::DATA_CALLS_MAX, of: vec![0; namespaces] };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Counts a call; `None` where there are too many.
    pub fn enter(self: &Arc<Self>, namespace: NamespaceId) -> Option<DataCall> {
        let mut state = self.state.lock();
        let State { free, of } = &mut *state;
        // Whoever shares with nobody may have them all.
        let shares = of.len() > 1;
        let mine = of.get_mut(namespace.0)?;
        if *free == 0 || (shares && *mine >= *free) {
            return None;
        }
        *free -= 1;
        *mine += 1;
        drop(state);
        Some(DataCall { calls: Arc::clone(self), namespace })
    }

    /// Calls that could begin, if one namespace had them all.
    pub fn free(&self) -> usize {
        self.state.lock().free
    }
}

impl Drop for DataCall {
    fn drop(&mut self) {
        let mut state = self.calls.state.lock();
        state.free += 1;
        if let Some(mine) = state.of.get_mut(self.namespace.0) {
            *mine -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(calls: &Arc<DataCalls>, namespace: usize) -> Vec<DataCall> {
        std::iter::from_fn(|| calls.enter(NamespaceId(namespace))).collect()
    }

    /// The gets of one namespace that nobody read kept every other namespace out.
    #[test]
    fn a_namespace_takes_no_more_than_it_leaves_to_others() {
        let calls = DataCalls::new(3);
        let first = fill(&calls, 0);
        assert_eq!(first.len(), caps::DATA_CALLS_MAX / 2);
        let second = fill(&calls, 1);
        assert_eq!(second.len(), caps::DATA_CALLS_MAX / 4);
        assert!(calls.enter(NamespaceId(2)).is_some(), "the third has its part");
        assert!(calls.enter(NamespaceId(0)).is_none());
        drop((first, second));
        assert_eq!(calls.free(), caps::DATA_CALLS_MAX);
    }

    #[test]
    fn a_namespace_that_is_alone_may_have_all() {
        let calls = DataCalls::new(1);
        assert_eq!(fill(&calls, 0).len(), caps::DATA_CALLS_MAX);
        assert!(calls.enter(NamespaceId(9)).is_none(), "there is no such namespace");
        assert_eq!(calls.free(), caps::DATA_CALLS_MAX);
    }
}
