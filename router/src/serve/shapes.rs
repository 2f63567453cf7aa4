//! What is known of whether prompts that are made here are the engine's, and what engines told of prompts that are not made here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use kvstore_chat::conversation::Beginning;
use kvstore_chat::engine::Engine;
use kvstore_chat::shape::Shape;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::caps;
use crate::hashing::Chain;

/// What is known of the prompts of one shape.
#[derive(Clone, Copy)]
pub(super) enum Seen {
    /// An engine is being asked.
    Asking,
    /// They were the engine's, then.
    Agrees(Instant),
    /// They were not, then. One odd request must not cost its shape for good.
    Differs(Instant),
    /// Nobody said; not to be asked before.
    Later(Instant),
}

/// Blocks of the beginnings of conversations, as engines told them: what was not asked for since the last turn of generations goes.
#[derive(Default)]
struct Told {
    young: HashMap<u64, Arc<Chain>>,
    old: HashMap<u64, Arc<Chain>>,
    young_bytes: usize,
}

/// See the head of this file.
pub(super) struct Shapes {
    seen: Mutex<HashMap<(String, Engine, Shape), Seen>>,
    told: Mutex<Told>,
    /// Engines that did not say, by their numbers, and when they may be asked again.
    silent: Mutex<HashMap<usize, Instant>>,
    pub(super) calls: Semaphore,
}

impl Default for Shapes {
    fn default() -> Self {
        let (seen, told, silent) = Default::default();
        Self { seen, told, silent, calls: Semaphore::new(caps::ENGINE_PROMPTS_AT_ONCE) }
    }
}

impl Told {
    fn get(&mut self, name: u64) -> Option<Arc<Chain>> {
        if let Some(chain) = self.young.get(&name) {
            return Some(Arc::clone(chain));
        }
        let chain = self.old.remove(&name)?;
        self.put(name, Arc::clone(&chain));
        Some(chain)
    }

    fn put(&mut self, name: u64, chain: Arc<Chain>) {
        self.young_bytes += 64 + chain.names.len() * size_of::<u64>() + chain.hashes.len() * 32;
        self.young.insert(name, chain);
        if self.young_bytes > caps::ENGINE_PROMPTS_BYTES / 2 {
            (self.old, self.young_bytes) = (std::mem::take(&mut self.young), 0);
        }
    }
}

impl Shapes {
    /// Whether prompts of this shape are known not to be the engine's.
    pub(super) fn differ(&self, (model, engine): (&str, Engine), shape: Shape) -> bool {
        let seen = self.seen.lock();
        let found = seen.get(&(model.to_owned(), engine, shape));
        matches!(found, Some(Seen::Differs(at)) if at.elapsed() <= caps::SHAPE_DIFFERS_FOR)
    }

    /// The blocks of the longest beginning of a conversation of which an engine told them.
    pub(super) fn told(&self, messages: &[Beginning]) -> Option<Arc<Chain>> {
        let mut told = self.told.lock();
        messages.iter().rev().find_map(|beginning| told.get(beginning.name))
    }

    /// Whether an engine told them of the whole conversation.
    pub(super) fn is_told(&self, name: u64) -> bool {
        self.told.lock().get(name).is_some()
    }

    /// An engine told these.
    pub(super) fn tell(&self, name: u64, chain: Chain) {
        self.told.lock().put(name, Arc::new(chain));
    }

    /// Whether an engine did not say lately, so that it is not asked.
    pub(super) fn is_silent(&self, engine: usize) -> bool {
        self.silent.lock().get(&engine).is_some_and(|until| Instant::now() < *until)
    }

    /// An engine did not say.
    pub(super) fn was_silent(&self, engine: usize) {
        let (mut silent, now) = (self.silent.lock(), Instant::now());
        silent.retain(|_, until| *until > now);
        silent.insert(engine, now + caps::ENGINE_PROMPT_AGAIN);
    }

    /// Takes a shape to be compared; false where it was lately, or is.
    pub(super) fn begin(&self, (model, engine): (&str, Engine), shape: Shape) -> bool {
        let (now, mut seen) = (Instant::now(), self.seen.lock());
        let key = (model.to_owned(), engine, shape);
        let is_due = match seen.get(&key) {
            None => seen.len() < caps::SHAPES_MAX,
            Some(Seen::Asking) => false,
            Some(Seen::Differs(at)) => now.duration_since(*at) > caps::SHAPE_DIFFERS_FOR,
            Some(Seen::Agrees(at)) => now.duration_since(*at) > caps::SHAPE_AGREES_FOR,
            Some(Seen::Later(until)) => now >= *until,
        };
        if is_due {
            seen.insert(key, Seen::Asking);
        }
        is_due
    }

    pub(super) fn end(&self, (model, engine): (&str, Engine), shape: Shape, seen: Seen) {
        self.seen.lock().insert((model.to_owned(), engine, shape), seen);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_engines_told_is_bounded_and_what_is_used_stays() {
        let mut told = Told::default();
        let chain =
            |blocks: usize| Arc::new(Chain { block_tokens: 16, names: vec![7; blocks], hashes: vec![[0; 32]; blocks] });
        let blocks = 4096;
        for name in 0..4000 {
            told.put(name, chain(blocks));
            assert!(told.get(0).is_some(), "it is asked for all the time");
        }
        let kept = told.young.len() + told.old.len();
        assert!(kept * blocks * 40 <= caps::ENGINE_PROMPTS_BYTES, "{kept}");
        assert!(told.get(1).is_none() && told.get(3999).is_some());
    }

    #[test]
    fn a_shape_is_compared_once_in_a_while() {
        let (shapes, shape) = (Shapes::default(), Shape::default());
        assert!(
            shapes.begin(("m", Engine::Vllm), shape)
                && !shapes.begin(("m", Engine::Vllm), shape)
                && shapes.begin(("m", Engine::Sglang), shape)
        );
        shapes.end(("m", Engine::Vllm), shape, Seen::Later(Instant::now() + Duration::from_secs(60)));
        assert!(!shapes.begin(("m", Engine::Vllm), shape) && !shapes.differ(("m", Engine::Vllm), shape));
        shapes.end(("m", Engine::Vllm), shape, Seen::Later(Instant::now()));
        assert!(shapes.begin(("m", Engine::Vllm), shape));
        shapes.end(("m", Engine::Vllm), shape, Seen::Agrees(Instant::now()));
        assert!(!shapes.begin(("m", Engine::Vllm), shape) && !shapes.differ(("m", Engine::Vllm), shape));
        shapes.end(("m", Engine::Vllm), shape, Seen::Differs(Instant::now()));
        assert!(
            !shapes.begin(("m", Engine::Vllm), shape)
                && shapes.differ(("m", Engine::Vllm), shape)
                && !shapes.differ(("m", Engine::Sglang), shape)
        );
        let long_ago = Instant::now().checked_sub(caps::SHAPE_DIFFERS_FOR + Duration::from_secs(1));
        if let Some(long_ago) = long_ago {
            shapes.end(("m", Engine::Vllm), shape, Seen::Differs(long_ago));
            assert!(
                !shapes.differ(("m", Engine::Vllm), shape) && shapes.begin(("m", Engine::Vllm), shape),
                "it is compared again"
            );
        }
    }
}
