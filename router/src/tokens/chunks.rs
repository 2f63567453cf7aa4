//! Tokens of pieces of text that came before: prompts share their beginnings, and tokenizing is most of what routing one costs.
//!
//! A text is cut where a word begins, about every thousand bytes, from its start on, so that texts with one beginning have the same first pieces. Most
//! tokenizers never have a token across such a place; whether a model's is one of them is tried when it is loaded.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_128;

use crate::caps;

/// Bytes of a piece, at least.
const PIECE_BYTES: usize = 1024;

/// The pieces of a text.
pub fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = rest.as_bytes();
        // A space between the end of a word and the beginning of another: all three are single bytes, so that no character is cut.
        let begins = |at: &usize| {
            let around = (bytes.get(at - 1), bytes.get(*at), bytes.get(at + 1));
            matches!(around, (Some(before), Some(b' '), Some(after)) if before.is_ascii_alphanumeric() && after.is_ascii_alphabetic())
        };
        let cut = (PIECE_BYTES..bytes.len()).find(begins).unwrap_or(bytes.len());
        let (piece, after) = rest.split_at(cut);
        rest = after;
        Some(piece)
    })
}

#[derive(Default)]
struct Generations {
    young: HashMap<u128, Arc<[u32]>>,
    old: HashMap<u128, Arc<[u32]>>,
}

/// The tokens of pieces, as many as may be; those that nobody asked for in a while go first.
#[derive(Default)]
pub struct Cache(Mutex<Generations>);

impl Cache {
    /// A piece's tokens, worked out by `encode` where they are not known.
    pub fn get<E>(&self, piece: &str, encode: impl FnOnce() -> Result<Vec<u32>, E>) -> Result<Arc<[u32]>, E> {
        let key = xxh3_128(piece.as_bytes());
        {
            let mut generations = self.0.lock();
            if let Some(tokens) = generations.young.get(&key) {
                return Ok(Arc::clone(tokens));
            }
            if let Some(tokens) = generations.old.remove(&key) {
                generations.keep(key, Arc::clone(&tokens));
                return Ok(tokens);
            }
        }
        let tokens: Arc<[u32]> = encode()?.into();
        self.0.lock().keep(key, Arc::clone(&tokens));
        Ok(tokens)
    }

    /// Pieces that are known.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        let generations = self.0.lock();
        generations.young.len() + generations.old.len()
    }
}

impl Generations {
    fn keep(&mut self, key: u128, tokens: Arc<[u32]>) {
        if self.young.len() >= caps::PIECES_KEPT_MAX / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_with_one_beginning_have_the_same_first_pieces() {
        let words: String = (0..2000).map(|at| format!("word{at} more, and\n  \u{e4}\u{f6} {at} ")).collect();
        let all: Vec<&str> = pieces(&words).collect();
        assert_eq!(all.concat(), words);
        assert!(all.len() > 20 && all[..all.len() - 1].iter().all(|piece| (1024..1200).contains(&piece.len())));
        assert!(all[1..].iter().all(|piece| piece.starts_with(' ')));
        let longer = format!("{words}and something else");
        let theirs: Vec<&str> = pieces(&longer).collect();
        assert_eq!(theirs[..all.len() - 1], all[..all.len() - 1]);
        assert_eq!(pieces("").count(), 0);
        assert_eq!(pieces(&"x".repeat(5000)).count(), 1, "no word begins");
        assert_eq!(pieces(&"\u{e4} ".repeat(5000)).collect::<String>().len(), 15_000);
    }

    #[test]
    fn what_is_asked_for_stays() {
        let cache = Cache::default();
        let get = |piece: &str| cache.get(piece, || Ok::<_, ()>(vec![piece.len() as u32])).unwrap();
        for at in 0..3 * caps::PIECES_KEPT_MAX {
            assert_eq!(get(&at.to_string())[0], at.to_string().len() as u32);
            assert_eq!(get("kept")[0], 4);
        }
        assert!(cache.len() <= caps::PIECES_KEPT_MAX);
        assert_eq!(cache.get("kept", || Err(())).unwrap()[0], 4, "it was never forgotten");
    }
}
