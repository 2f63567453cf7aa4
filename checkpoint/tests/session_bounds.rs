//! What a session may hold, and what its records say after pieces were replaced: whatever was acknowledged is read back, and fits where it must.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod actors;

use std::sync::Arc;

use actors::{Door, head, ids, name};
use kvstore_checkpoint::sessions::{
    Acknowledged, Append, Block, Data, Head, NewPiece, Opaque, Refusal, Session, Shape, Step, Writer,
};
use object_store::memory::InMemory;

async fn writer(memory: &Arc<InMemory>, called: &str) -> Writer {
    Writer::begin(&Door::new(memory).store(), called).await.unwrap()
}

async fn one(writer: &Writer, step: Step) -> Result<Acknowledged, Refusal> {
    writer.commit(vec![step]).await.unwrap().remove(0)
}

fn shaped(block_tokens: u32, groups: u16, prompt: &[u32]) -> Head {
    Head { shape: Shape { block_tokens, groups, ranks: 1 }, ..head(prompt) }
}

fn piece(group: u16, start: u64, tokens: u32, bytes: usize) -> NewPiece {
    NewPiece { group, rank: 0, start, tokens, data: Data::Inline(vec![7; bytes].into()) }
}

fn first_block(group: u16) -> Block {
    Block { index: 0, group, rank: 0, name: Opaque(vec![1]), parent: None }
}

async fn found(memory: &Arc<InMemory>, id: &str) -> Session {
    let inspected = Door::new(memory).store().inspect(&name(id)).await.unwrap();
    inspected.session.unwrap()
}

/// The full record had a piece of tokens 0 to 10. One append replaced it by one of tokens 0 to 8, the next one named the block that holds those.
/// The record that joins the two left the piece out, as nobody needs it: whoever read it found the first piece again, and KV of 10 tokens where
/// the owner had that of 8.
#[tokio::test]
async fn a_piece_that_was_replaced_does_not_come_back() {
    for (replaces, cut) in [(0, 8), (0, 10), (3, 4), (3, 7), (7, 1)] {
        let memory = Arc::new(InMemory::new());
        let first = writer(&memory, "first").await;
        first.open(&name("a")).await.unwrap();
        let prompt: Vec<u32> = (0..10).collect();
        let begins = Append { pieces: vec![piece(0, 0, 10, 5)], valid_tokens: 10, ..ids(10, &[]) };
        one(&first, Step::begin(name("a"), shaped(8, 1, &prompt), Some(begins))).await.unwrap();
        let end = u64::from(cut) + replaces;
        let replacing = Append { pieces: vec![piece(0, replaces, cut, 4)], valid_tokens: end, ..ids(10, &[]) };
        one(&first, Step::append(name("a"), replacing)).await.unwrap();
        let valid_tokens = end.max(8);
        let blocks = Append { blocks: vec![first_block(0)], valid_tokens, ..ids(10, &[]) };
        one(&first, Step::append(name("a"), blocks)).await.unwrap();
        let session = found(&memory, "a").await;
        let left: Vec<_> = session.pieces.0.iter().map(|piece| (piece.start, piece.tokens)).collect();
        let expected = if end > 8 { vec![(replaces, cut)] } else { Vec::new() };
        assert_eq!((left, session.valid_tokens), (expected, valid_tokens), "{replaces} and {cut} more");
        // What the owner may say next is what whoever reads it may hear.
        let too_much = Append { valid_tokens: valid_tokens + 1, ..ids(10, &[]) };
        assert!(one(&first, Step::append(name("a"), too_much)).await.is_err());
        let mut at = valid_tokens;
        for token in 0..6 {
            let more =
                Append { pieces: vec![piece(0, at, 1, 3)], valid_tokens: at + 1, ..ids(10 + token, &[token as u32]) };
            one(&first, Step::append(name("a"), more)).await.unwrap();
            at += 1;
            assert_eq!(found(&memory, "a").await.valid_tokens, at);
        }
        let claimed = writer(&memory, "second").await.claim(&name("a")).await.unwrap();
        assert_eq!(claimed.session.unwrap().valid_tokens, at);
    }
}
