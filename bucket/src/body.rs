//! A body that is read piece by piece: as it comes from a connection, or from a file in steps of its own. The client library reads a
//! file 8 KiB at a time, each by a call to another thread, which is an eighth of what a disk or the page cache gives.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::{GetResult, GetResultPayload};

use super::requests::Trouble;
use crate::caps;

/// See the head of this file.
pub struct Body(Source);

enum Source {
    Connection { pieces: BoxStream<'static, object_store::Result<Bytes>>, piece: Bytes },
    File { file: Arc<File>, at: u64, end: u64, piece: Vec<u8> },
}

impl Body {
    /// The body of this answer.
    pub fn of(got: GetResult) -> Self {
        let (at, end) = (got.range.start, got.range.end);
        match got.payload {
            GetResultPayload::File(file, _) => Self(Source::File { file: Arc::new(file), at, end, piece: Vec::new() }),
            GetResultPayload::Stream(pieces) => Self(Source::Connection { pieces, piece: Bytes::new() }),
        }
    }

    /// The next piece; nothing where the body has ended.
    pub async fn next(&mut self) -> Result<Option<&[u8]>, Trouble> {
        match &mut self.0 {
            Source::Connection { pieces, piece } => {
                let Some(next) = pieces.next().await else { return Ok(None) };
                *piece = next.map_err(|error| Trouble::Failed(error.to_string()))?;
                Ok(Some(piece))
            }
            Source::File { file, at, end, piece } => {
                let bytes = (*end - *at).min(caps::OBJECT_FILE_STEP_BYTES);
                if bytes == 0 {
                    return Ok(None);
                }
                let (file, from, mut buffer) = (Arc::clone(file), *at, std::mem::take(piece));
                let read = tokio::task::spawn_blocking(move || {
                    buffer.resize(bytes as usize, 0);
                    file.read_exact_at(&mut buffer, from).map(|()| buffer)
                });
                *piece = read.await.map_err(std::io::Error::other).flatten().map_err(of_file)?;
                *at += bytes;
                Ok(Some(piece))
            }
        }
    }
}

fn of_file(error: std::io::Error) -> Trouble {
    match error.kind() {
        // It had that many bytes when it was opened.
        std::io::ErrorKind::UnexpectedEof => Trouble::Damaged("the file became shorter while it was read".into()),
        _ => Trouble::Failed(error.to_string()),
    }
}
