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

/// The pieces of one append were bounded, and those that a record joins were not: the record of the 128th append, of a session of 640 shards, had
/// 81,920, was acknowledged, and was refused by whoever read it.
#[tokio::test]
async fn no_record_has_more_pieces_than_can_be_read() {
    const GROUPS: u16 = 640;
    let memory = Arc::new(InMemory::new());
    let first = writer(&memory, "first").await;
    first.open(&name("a")).await.unwrap();
    let prompt: Vec<u32> = (0..200).collect();
    one(&first, Step::begin(name("a"), shaped(256, GROUPS, &prompt), None)).await.unwrap();
    let mut tokens = 0;
    for token in 0..128_u64 {
        let pieces = (0..GROUPS).map(|group| NewPiece {
            data: Data::Chunk { bytes: 9, digest: "0".repeat(64).parse().unwrap() },
            ..piece(group, token, 1, 0)
        });
        let append = Append { pieces: pieces.collect(), valid_tokens: token + 1, ..ids(200, &[]) };
        match one(&first, Step::append(name("a"), append)).await {
            Ok(_) => tokens = token + 1,
            Err(refused) => {
                assert!(refused.to_string().contains("more than 65536 pieces"), "{refused}");
                break;
            }
        }
    }
    assert_eq!(tokens, 65536 / u64::from(GROUPS));
    let session = found(&memory, "a").await;
    assert_eq!((session.valid_tokens, session.pieces.0.len() as u64), (tokens, tokens * u64::from(GROUPS)));
    // Blocks make room.
    let blocks = (0..GROUPS).map(|group| Block { group, ..first_block(0) }).collect();
    let append = Append { blocks, valid_tokens: 256, ..ids(200, &[5; 60]) };
    assert_eq!(one(&first, Step::append(name("a"), append)).await.unwrap().valid_tokens, 256);
    assert_eq!(found(&memory, "a").await.pieces.0, []);
}

/// A session's pieces were written over several commits, and were more than fit into one: whoever claimed it could not write them again, was told
/// to give them to the next commit, and to the next one. What does not fit is left out, and said to be.
#[tokio::test]
async fn a_claimant_keeps_what_fits_into_its_first_commit() {
    let memory = Arc::new(InMemory::new());
    let first = writer(&memory, "first").await;
    first.open(&name("a")).await.unwrap();
    let prompt: Vec<u32> = (0..20).collect();
    one(&first, Step::begin(name("a"), shaped(256, 1, &prompt), None)).await.unwrap();
    for token in 0..20 {
        let append = Append { pieces: vec![piece(0, token, 1, 5 << 20)], valid_tokens: token + 1, ..ids(20, &[]) };
        one(&first, Step::append(name("a"), append)).await.unwrap();
    }
    let second = writer(&memory, "second").await;
    let claimed = second.claim(&name("a")).await.unwrap();
    assert_eq!((claimed.session.unwrap().valid_tokens, claimed.pieces.len()), (20, 20));
    let step = Step::append(name("a"), Append { valid_tokens: 4, ..ids(20, &[]) });
    assert_eq!(one(&second, step).await.unwrap().valid_tokens, 4);
    let third = writer(&memory, "third").await;
    let claimed = third.claim(&name("a")).await.unwrap();
    assert_eq!(claimed.pieces.len(), 6, "32 MiB of them");
    assert!(claimed.pieces.iter().all(|data| data.as_ref().unwrap().len() == 5 << 20));
    // What fits into no commit is not sent from one to the next.
    let huge = (0..10).map(|at| piece(0, at, 1, 8 << 20)).collect();
    let step = Step::append(name("a"), Append { pieces: huge, ..ids(20, &[]) });
    assert!(matches!(one(&third, step).await, Err(Refusal::NeverFits { .. })));
}
