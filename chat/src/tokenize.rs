//! From a text to an engine's tokens: what transformers' tokenizer makes of it, in pieces that are known from other texts where that is
//! exact.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer as Inner};
use xxhash_rust::xxh3::xxh3_128;

use crate::files::{Added, Files};

/// Bytes of a piece, at least.
const PIECE_BYTES: usize = 1024;
/// Pieces whose tokens are kept: of 300 tokens each, some 20 MiB.
const PIECES_KEPT_MAX: usize = 16 << 10;
/// A piece with more bytes is not kept, so that the number of pieces bounds the memory.
const KEPT_BYTES_MAX: usize = 8 << 10;

/// A tokenizer that could not be made, or a text that it refuses.
#[derive(Debug, thiserror::Error)]
pub enum TokenizeError {
    /// `tokenizer.json`.
    #[error("tokenizer.json cannot be used: {0}")]
    File(String),
    /// The text.
    #[error("the prompt cannot be tokenized: {0}")]
    Text(String),
}

/// Tokens of a text, or of its beginning.
#[derive(Debug, PartialEq, Eq)]
pub struct Encoded {
    /// They.
    pub ids: Vec<u32>,
    /// How many the whole text has; a guess where these are not all.
    pub count: u64,
    /// These are all.
    pub whole: bool,
}

/// Which end of a prompt that is too long is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Its end goes.
    Right,
    /// Its beginning goes.
    Left,
}

/// See the head of this file.
pub struct Tokenizer {
    inner: Inner,
    /// Tokens that stand before and after a text with special ones.
    around: (Vec<u32>, Vec<u32>),
    /// Where texts may be cut.
    pieces: Option<Pieces>,
}

impl Tokenizer {
    /// The tokenizer of these files.
    pub fn new(files: &Files) -> Result<Self, TokenizeError> {
        let made = std::panic::catch_unwind(AssertUnwindSafe(|| Self::made(files)));
        made.unwrap_or_else(|_| Err(TokenizeError::File("the library of tokenizers fails on it".into())))
    }

    fn made(files: &Files) -> Result<Self, TokenizeError> {
        let wrong = |error: tokenizers::Error| TokenizeError::File(error.to_string());
        let bytes = serde_json::to_vec(&files.tokenizer).map_err(|error| TokenizeError::File(error.to_string()))?;
        let mut inner = Inner::from_bytes(bytes).map_err(wrong)?;
        for added in &files.added {
            let token = AddedToken::from(added.content.clone(), added.special)
                .single_word(added.single_word)
                .lstrip(added.lstrip)
                .rstrip(added.rstrip)
                .normalized(added.normalized);
            match added.special {
                true => inner.add_special_tokens(&[token]),
                false => inner.add_tokens(&[token]),
            };
        }
        let mut made = Self { inner, around: (Vec::new(), Vec::new()), pieces: None };
        made.try_cutting(files)?;
        Ok(made)
    }

    /// Whether texts may be cut: no token can span a cut, and what is tried has the same tokens, whole and in pieces.
    fn try_cutting(&mut self, files: &Files) -> Result<(), TokenizeError> {
        let (with, without) = (self.encode_whole(TRIED, true)?, self.encode_whole(TRIED, false)?);
        let Some(at) = with.windows(without.len().max(1)).position(|window| window == without) else { return Ok(()) };
        let (before, rest) = with.split_at(at);
        self.around = (before.to_vec(), rest.get(without.len()..).unwrap_or_default().to_vec());
        if may_span(files) {
            return Ok(());
        }
        self.pieces = Some(Pieces::default());
        let text = TRIED.repeat(4);
        if self.encode(&text, true)? != self.encode_whole(&text, true)? {
            self.pieces = None;
        }
        Ok(())
    }

    /// The tokens of a text. `special`: with those that the model expects around a prompt.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizeError> {
        Ok(self.encode_while(text, special, |_| true)?.ids)
    }

    /// The tokens of a text's beginning: of more and more of it, while those so far may be followed by others that matter.
    pub fn encode_while(
        &self,
        text: &str,
        special: bool,
        mut goes_on: impl FnMut(&[u32]) -> bool,
    ) -> Result<Encoded, TokenizeError> {
        let Some(known) = &self.pieces else {
            let ids = self.encode_whole(text, special)?;
            return Ok(Encoded { count: ids.len() as u64, ids, whole: true });
        };
        let mut ids = Vec::with_capacity(text.len() / 3);
        let (before, after) = &self.around;
        if special {
            ids.extend_from_slice(before);
        }
        let (mut bytes, mut count, mut asks_at) = (0, 0, 1);
        for piece in pieces(text) {
            ids.extend_from_slice(&known.get(piece, || self.encode_whole(piece, false))?);
            bytes += piece.len();
            count += 1;
            // Twice as much each time: what is asked about again is no more than what is new.
            if count == asks_at && bytes < text.len() {
                asks_at *= 2;
                if !goes_on(&ids) {
                    let count = (ids.len() as f64 * text.len() as f64 / bytes as f64) as u64;
                    return Ok(Encoded { ids, count, whole: false });
                }
            }
        }
        if special {
            ids.extend_from_slice(after);
        }
        Ok(Encoded { count: ids.len() as u64, ids, whole: true })
    }

    /// The tokens of a text, `most` of them, special ones included: as engines cut prompts that say no side.
    pub fn encode_cut(&self, text: &str, special: bool, most: usize, side: Side) -> Result<Vec<u32>, TokenizeError> {
        if !special {
            return Ok(cut(self.encode(text, false)?, most, side));
        }
        let (before, after) = &self.around;
        let room = most.saturating_sub(before.len() + after.len());
        let inner = cut(self.encode(text, false)?, room, side);
        Ok([before.as_slice(), &inner, after].concat())
    }

    /// Whether the text of these tokens ends with a whole character.
    pub fn ends_with_character(&self, ids: &[u32]) -> bool {
        // No character has more bytes than four, and hardly a token less than one.
        let end = ids.get(ids.len().saturating_sub(8)..).unwrap_or_default();
        self.inner.decode(end, false).is_ok_and(|text| !text.ends_with('\u{fffd}'))
    }

    /// Whether it adds tokens to a text.
    pub fn adds_tokens(&self) -> bool {
        self.encode_whole("", true).is_ok_and(|ids| !ids.is_empty())
    }

    fn encode_whole(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizeError> {
        // There are files on which the library panics, with some texts: that must cost no more than those.
        let encode = || self.inner.encode_fast(text, special);
        let encoded = std::panic::catch_unwind(AssertUnwindSafe(encode));
        let encoded = encoded.map_err(|_| TokenizeError::Text("the library of tokenizers fails on it".into()))?;
        Ok(encoded.map_err(|error| TokenizeError::Text(error.to_string()))?.get_ids().to_vec())
    }
}

/// As many of these tokens.
pub fn cut(mut ids: Vec<u32>, most: usize, side: Side) -> Vec<u32> {
    match side {
        Side::Right => ids.truncate(most),
        Side::Left => _ = ids.drain(..ids.len().saturating_sub(most)),
    }
    ids
}

/// What a tokenizer is tried with: prose, code, numbers, other scripts, white space.
const TRIED: &str = "The quick brown fox, said Dr. O'Neill, doesn't jump over 12,345.67 lazy dogs; it sleeps. \
    fn main() { let x = vec![1, 2, 3]; println!(\"{x:?}\"); } // a comment\n\n    if a == b and c != d:\n\treturn None\n\
    https://example.org/path?query=1&other=two user@example.org C:\\Users\\me 2026-11-26T12:00:00Z \
    Stra\u{df}e na\u{ef}ve \u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c} \u{43f}\u{440}\u{438}\u{432}\u{435}\u{442} \u{645}\u{631}\u{62d}\u{628}\u{627} \u{1f600}\u{1f680} end of it   and then more words follow here ";

/// The types of a part of the tokenizer, and of those that it is a sequence of.
fn types<'a>(part: Option<&'a Value>, inner: &str) -> Vec<&'a str> {
    let Some(part) = part else { return Vec::new() };
    let each = part.get(inner).and_then(Value::as_array).into_iter().flatten();
    let own = part.get("type").and_then(Value::as_str);
    own.into_iter().chain(each.flat_map(|one| types(Some(one), inner))).collect()
}

/// Whether a text begins or ends otherwise than within another, or spaces are not written as spaces usually are.
fn reads_borders(files: &Files) -> bool {
    let (normalizer, pre) = (files.tokenizer.get("normalizer"), files.tokenizer.get("pre_tokenizer"));
    let (normalizers, pres) = (types(normalizer, "normalizers"), types(pre, "pretokenizers"));
    let has = |all: &[&str], names: &[&str]| all.iter().any(|one| names.contains(one));
    has(&normalizers, &["Strip", "Prepend"]) || has(&normalizers, &["Replace"]) && has(&pres, &["ByteLevel"])
}

/// Whether a token may lie across a place where a letter or a digit is followed by a space.
fn may_span(files: &Files) -> bool {
    if reads_borders(files) {
        return true;
    }
    // A space in a vocabulary: itself, or as models write it.
    let is_space = |letter: char| matches!(letter, ' ' | '\u{120}' | '\u{2581}');
    let spans = |text: &str| {
        text.chars().zip(text.chars().skip(1)).any(|(one, next)| one.is_ascii_alphanumeric() && is_space(next))
    };
    let vocabulary = files.tokenizer.get("model").and_then(|model| model.get("vocab"));
    let in_vocabulary = match vocabulary {
        Some(Value::Object(tokens)) => tokens.keys().any(|token| spans(token)),
        Some(Value::Array(tokens)) => {
            tokens.iter().any(|token| token.get(0).and_then(Value::as_str).is_some_and(spans))
        }
        _ => true,
    };
    // One that takes the white space beside it, or stands only where no word does.
    let looks_around = |added: &Added| {
        let begins = added.content.starts_with(|letter: char| letter.is_ascii_alphabetic());
        let ends = added.content.ends_with(|letter: char| letter.is_ascii_alphanumeric());
        spans(&added.content)
            || added.lstrip && (begins || added.content.starts_with(' '))
            || (added.rstrip || added.single_word) && ends
            || added.single_word && begins
    };
    let in_file = files.tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    in_vocabulary || in_file.filter_map(Added::of).chain(files.added.iter().cloned()).any(|added| looks_around(&added))
}

/// The pieces of a text: it is cut where a word begins, about every thousand bytes, from its start on, so that texts with one beginning
/// have the same first pieces.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = rest.as_bytes();
        // A space between the end of a word and the beginning of another: all three are single bytes, so that no character is cut.
        let begins = |at: &usize| {
            let around = (bytes.get(at.wrapping_sub(1)), bytes.get(*at), bytes.get(at + 1));
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

/// The tokens of pieces that came before; those that nobody asked for in a while go first.
#[derive(Default)]
struct Pieces(Mutex<Generations>);

impl Pieces {
    fn get<E>(&self, piece: &str, encode: impl FnOnce() -> Result<Vec<u32>, E>) -> Result<Arc<[u32]>, E> {
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
        if piece.len() <= KEPT_BYTES_MAX {
            self.0.lock().keep(key, Arc::clone(&tokens));
        }
        Ok(tokens)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        let generations = self.0.lock();
        generations.young.len() + generations.old.len()
    }
}

impl Generations {
    fn keep(&mut self, key: u128, tokens: Arc<[u32]>) {
        if self.young.len() >= PIECES_KEPT_MAX / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, tokens);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
    }

    #[test]
    fn what_is_asked_for_stays() {
        let known = Pieces::default();
        let get = |piece: &str| known.get(piece, || Ok::<_, ()>(vec![piece.len() as u32])).unwrap();
        for at in 0..3 * PIECES_KEPT_MAX {
            assert_eq!(get(&at.to_string())[0], at.to_string().len() as u32);
            assert_eq!(get("kept")[0], 4);
        }
        assert!(known.len() <= PIECES_KEPT_MAX);
        assert_eq!(known.get("kept", || Err(())).unwrap()[0], 4, "it was never forgotten");
        let long = "x".repeat(KEPT_BYTES_MAX + 1);
        assert_eq!(
            (get(&long)[0] as usize, known.get(&long, || Err(()))),
            (long.len(), Err(())),
            "too long to be kept"
        );
    }

    /// A tokenizer with a word for each of a few words.
    fn tokenizer(pre_tokenizer: Value) -> Tokenizer {
        let words = ["[UNK]", "<s>", "user", "assistant", "system", "hello", "there", ":", "tool"];
        let vocabulary: serde_json::Map<String, Value> =
            words.iter().zip(0..).map(|(word, id)| ((*word).to_owned(), json!(id))).collect();
        let start = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let file = json!({
            "version": "1.0",
            "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": pre_tokenizer,
            "post_processor": {"type": "TemplateProcessing", "single": [start, text("A")], "pair": [text("A"), text("B")],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        Tokenizer::new(&Files::read(folder.path(), None).unwrap()).unwrap()
    }

    /// In pieces, from the cache and not, a text has the tokens that it has as a whole; a tokenizer that has tokens across words is not cut.
    #[test]
    fn long_texts_have_the_tokens_that_they_have_as_a_whole() {
        let made = tokenizer(json!({"type": "Whitespace"}));
        assert!(made.pieces.is_some() && made.around == (vec![1], vec![]));
        let text = "hello there user : assistant tool system ".repeat(500);
        for text in [&text, &format!("{text} there"), &text[..5000].to_owned()] {
            for special in [true, false] {
                assert_eq!(made.encode(text, special).unwrap(), made.encode_whole(text, special).unwrap());
            }
        }
        assert_eq!(made.encode_cut("hello there user", true, 3, Side::Right).unwrap(), [1, 5, 6]);
        assert_eq!(made.encode_cut("hello there user", true, 3, Side::Left).unwrap(), [1, 6, 2]);
        let lines = json!({"type": "Split", "pattern": {"String": "\n"}, "behavior": "Removed", "invert": false});
        let made = tokenizer(lines);
        assert!(made.pieces.is_none());
        assert_eq!(made.encode(&text, false).unwrap(), [0], "one line, one unknown word");
    }

    /// A vocabulary may hold tokens of several words, which a trial with some text need not meet.
    #[test]
    fn a_vocabulary_with_tokens_of_several_words_is_not_cut() {
        let may = |tokens: &[&str], added: Value| {
            let vocabulary: serde_json::Map<String, Value> =
                tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), json!(id))).collect();
            let file = json!({"added_tokens": added, "model": {"vocab": vocabulary}});
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
            may_span(&Files::read(folder.path(), None).unwrap())
        };
        assert!(!may(&["the", "\u{120}the", "\u{10a}\u{120}\u{120}", "\u{2581}a"], json!([])));
        assert!(may(&["of\u{120}the"], json!([])) && may(&["of\u{2581}the"], json!([])) && may(&["of the"], json!([])));
        let flags = |content: &str, lstrip: bool, rstrip: bool| json!([{"content": content, "lstrip": lstrip, "rstrip": rstrip}]);
        assert!(!may(&["a"], flags("<X>", true, true)) && !may(&["a"], flags("Xy", false, false)));
        assert!(may(&["a"], flags("Xy", true, false)) && may(&["a"], flags("Xy", false, true)));
        assert!(may(&["a"], flags("<end of>", false, false)));
    }

    /// A file on which the library panics ended the router at its start.
    #[test]
    fn a_tokenizer_that_cannot_be_used_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: Value| std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        for file in [json!({}), json!({"model": {"type": "Other"}}), json!({"version": "1.0", "model": 7})] {
            write(file);
            let made = Tokenizer::new(&Files::read(folder.path(), None).unwrap());
            assert!(matches!(made, Err(TokenizeError::File(_))));
        }
    }

    /// Pieces of texts lost what a normalizer takes from, or adds to, the border of a text; a space was taken for one in other letters.
    #[test]
    fn what_depends_on_a_texts_borders_is_not_cut() {
        let reads = |normalizer: Value, pre: Value| {
            let folder = tempfile::tempdir().unwrap();
            let file = json!({"normalizer": normalizer, "pre_tokenizer": pre, "model": {"vocab": {"a": 0}}});
            std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
            may_span(&Files::read(folder.path(), None).unwrap())
        };
        let byte_level = json!({"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]});
        let sequence = |kind: &str| json!({"type": "Sequence", "normalizers": [{"type": kind}]});
        assert!(reads(sequence("Replace"), byte_level.clone()) && !reads(sequence("NFC"), byte_level.clone()));
        assert!(reads(sequence("Strip"), json!(null)) && reads(json!({"type": "Prepend"}), byte_level));
        assert!(!reads(sequence("Replace"), json!(null)));
    }

    #[test]
    fn a_prompt_that_is_too_long_is_cut_at_the_side_that_was_asked_for() {
        let ids = vec![1, 2, 3, 4];
        assert_eq!(cut(ids.clone(), 3, Side::Right), [1, 2, 3]);
        assert_eq!(cut(ids.clone(), 3, Side::Left), [2, 3, 4]);
        assert_eq!((cut(ids.clone(), 9, Side::Left), cut(ids, 0, Side::Right)), (vec![1, 2, 3, 4], vec![]));
    }
}
