//! Blocks that the router cannot name by what an engine calls them: an adapter's, whose path is part of the hash and known to the engine
//! alone, and those of groups that keep the ends of prompts (windows, states), whose events name a span of tokens and list fewer blocks than it
//! has, of a size of their own. They are named by the tokens of their events, in blocks of the size that prompts are asked for in.
//!
//! It owns which names an engine's hashes stand for, and knows nothing of who holds what.

use std::collections::HashMap;

use super::vllm::{GroupKind, Stored};
use crate::caps;
use crate::names;

/// What one hash stands for.
#[derive(Clone, Debug)]
enum Meaning {
    /// It is one block of a prompt; and the name of that.
    One(u64),
    /// These blocks are there while it is; and the name of the prompt's beginning up to its end, where that is known.
    Some { present: Box<[u64]>, end: Option<u64> },
}

impl Meaning {
    fn present(&self) -> &[u64] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Some { present, .. } => present,
        }
    }

    fn end(&self) -> Option<u64> {
        match self {
            Self::One(name) => Some(*name),
            Self::Some { end, .. } => *end,
        }
    }
}

/// Of one layer group: see the head of this file.
#[derive(Debug, Default)]
pub struct Learnt(HashMap<u64, Meaning>);

impl Learnt {
    /// The names of what was stored, in a prompt's blocks of `each` tokens. `None`: its parent is not known, or it says too little.
    pub fn store(&mut self, stored: &Stored, each: u32) -> Option<Vec<u64>> {
        let (each, own) = (each.max(1) as usize, stored.block_tokens.max(1) as usize);
        let before = match stored.parent {
            None => None,
            Some(parent) => Some(self.0.get(&parent)?.end()?),
        };
        // Extra keys are of the engine's own blocks: beyond the first, a salt's, they have no place in others.
        if each != own && stored.extras.iter().skip(1).any(|extra| *extra != 0) {
            return None;
        }
        let seed = names::adapter_seed(stored.adapter.as_deref());
        let extras = stored.extras.iter().copied().chain(std::iter::repeat(0));
        let mut all = Vec::with_capacity(stored.tokens.len() / each);
        let mut last = before;
        for (tokens, extra) in stored.tokens.chunks_exact(each).zip(extras) {
            let name = names::next_name(last, names::tokens_hash(tokens, seed) ^ extra);
            all.push(name);
            last = Some(name);
        }
        let first = (stored.tokens.len() / own).saturating_sub(stored.hashes.len());
        let mut present = Vec::new();
        for (at, hash) in (first..).zip(&stored.hashes) {
            let place = Place { first, at, own, each };
            let meaning = place.meaning(&all, stored.kind);
            present.extend_from_slice(meaning.present());
            if self.0.len() < caps::LEARNT_MAX || self.0.contains_key(hash) {
                self.0.insert(*hash, meaning);
            }
        }
        present.dedup();
        // What could not be removed again is not stored either.
        (self.0.len() < caps::LEARNT_MAX).then_some(present)
    }

    /// The names of what left.
    pub fn remove(&mut self, hashes: &[u64]) -> Vec<u64> {
        let gone = hashes.iter().filter_map(|hash| self.0.remove(hash));
        gone.flat_map(|meaning| meaning.present().to_vec()).collect()
    }

    /// Whether a hash stands for something.
    pub fn has(&self, hash: u64) -> bool {
        self.0.contains_key(&hash)
    }

    /// Whether none does.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One of a group's own blocks in a span.
struct Place {
    /// The first that is there.
    first: usize,
    at: usize,
    /// Tokens of the group's blocks.
    own: usize,
    /// Tokens of a prompt's.
    each: usize,
}

impl Place {
    fn meaning(&self, names: &[u64], kind: GroupKind) -> Meaning {
        let (begin, end) = (self.at * self.own, (self.at + 1) * self.own);
        let name_at = |tokens: usize| {
            let block = (tokens / self.each).checked_sub(1).filter(|_| tokens.is_multiple_of(self.each))?;
            names.get(block).copied()
        };
        let at_end = name_at(end);
        if self.own == self.each {
            return at_end.map_or(Meaning::Some { present: Box::default(), end: None }, Meaning::One);
        }
        let present: Box<[u64]> = match kind {
            // A state is that of its end alone.
            GroupKind::State => at_end.into_iter().collect(),
            _ if self.own > self.each => names.get(begin / self.each..end / self.each).unwrap_or_default().into(),
            // Of a larger block, as much as a window reaches back has to be there: it ends with each of those.
            _ => {
                let reach =
                    if let GroupKind::Window(window) = kind { self.each.min(window as usize) } else { self.each };
                let whole = end.next_multiple_of(self.each);
                let needs = whole.saturating_sub(reach) / self.own;
                let is_there = self.each.is_multiple_of(self.own) && (self.first..=self.at).contains(&needs);
                name_at(whole).into_iter().filter(|_| is_there).collect()
            }
        };
        Meaning::Some { present, end: at_end }
    }
}
