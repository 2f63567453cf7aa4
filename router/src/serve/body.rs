//! Bodies of requests: read whole, within a limit each, and within one for all of them together.

use std::sync::Arc;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::openai::ApiError;
use crate::caps;

/// Memory for requests is counted in steps of this.
const STEP: usize = 4096;

/// Memory for the bodies of requests under way.
pub(super) struct Bodies {
    steps: Arc<Semaphore>,
    each_max: u64,
}

/// What a request takes of it; given back with this value.
#[derive(Default)]
pub(super) struct Held {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Bodies {
    /// Each of at most `each_max` bytes.
    pub(super) fn new(each_max: u64) -> Self {
        let all = (each_max as usize).max(caps::REQUESTS_BYTES_MAX);
        Self { steps: Arc::new(Semaphore::new((all / STEP).min(Semaphore::MAX_PERMITS))), each_max }
    }

    /// Memory of so many bytes for as long as the value lives; `None` where there is none left.
    pub(super) fn hold(&self, bytes: usize) -> Option<Held> {
        let steps = u32::try_from(bytes.div_ceil(STEP)).ok()?;
        let permit = Arc::clone(&self.steps).try_acquire_many_owned(steps).ok()?;
        Some(Held { _permit: Some(permit) })
    }

    /// Reads a body to its end. `headers`: of its request.
    pub(super) async fn read(&self, headers: &HeaderMap, mut body: Body) -> Result<(Bytes, Held), ApiError> {
        let announced = hyper::body::Body::size_hint(&body).lower();
        if announced > self.each_max {
            // Who asks for leave has sent nothing yet.
            if !headers.contains_key(header::EXPECT) && announced / 4 <= self.each_max {
                drain(body, self.each_max).await;
            }
            return Err(ApiError::too_large(self.each_max));
        }
        let mut held: Option<OwnedSemaphorePermit> = None;
        let mut hold = |bytes: usize| -> Result<(), ApiError> {
            let has = held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
            let more = bytes.div_ceil(STEP).saturating_sub(has);
            let more = Arc::clone(&self.steps).try_acquire_many_owned(u32::try_from(more).unwrap_or(u32::MAX));
            let more = more.map_err(|_| ApiError::busy())?;
            match &mut held {
                Some(held) => held.merge(more),
                None => held = Some(more),
            }
            Ok(())
        };
        // One frame, as most requests are, is taken as it is.
        let mut first = Bytes::new();
        let mut whole = BytesMut::new();
        loop {
            let frame = tokio::time::timeout(caps::BODY_WITHIN, body.frame()).await;
            let Some(frame) = frame.map_err(|_| ApiError::slow_body(caps::BODY_WITHIN))? else { break };
            let frame = frame
                .map_err(|error| ApiError::invalid(None, format!("the request's body did not come whole: {error}")))?;
            let Ok(data) = frame.into_data() else { continue };
            let all = first.len() + whole.len() + data.len();
            if all as u64 > self.each_max {
                drain(body, self.each_max).await;
                return Err(ApiError::too_large(self.each_max));
            }
            hold(all)?;
            if first.is_empty() && whole.is_empty() {
                first = data;
                continue;
            }
            if whole.is_empty() {
                // No more ahead than what is counted.
                whole.reserve((announced as usize).min(2 * all));
                whole.extend_from_slice(&std::mem::take(&mut first));
            }
            whole.extend_from_slice(&data);
        }
        let whole = if whole.is_empty() { first } else { whole.freeze() };
        Ok((whole, Held { _permit: held }))
    }
}

/// Reads on for a while, and keeps nothing: a client that is answered while it sends may never see the answer.
async fn drain(mut body: Body, each_max: u64) {
    let mut left = each_max.saturating_mul(4);
    let all = async {
        while let Some(Ok(frame)) = body.frame().await {
            let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
            left = left.saturating_sub(bytes);
            if left == 0 {
                return;
            }
        }
    };
    // In vain for one that sends more, or slowly: it is cut off.
    let _ = tokio::time::timeout(caps::DRAIN_WITHIN, all).await;
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;

    #[tokio::test]
    async fn bodies_are_bounded_each_and_together() {
        let (bodies, none) = (Bodies::new(10_000), HeaderMap::new());
        let (all, held) = bodies.read(&none, Body::from("x".repeat(10_000))).await.unwrap();
        assert_eq!((all.len(), held._permit.as_ref().map(OwnedSemaphorePermit::num_permits)), (10_000, Some(3)));
        let status = |error: ApiError| error.into_response().status().as_u16();
        assert_eq!(status(bodies.read(&none, Body::from("x".repeat(10_001))).await.err().unwrap()), 413);
        // Without a length ahead, in pieces.
        let pieces = |count: usize| {
            let piece = |_| Ok::<_, std::io::Error>(Bytes::from("x".repeat(1000)));
            Body::from_stream(futures::stream::iter((0..count).map(piece)))
        };
        assert_eq!(bodies.read(&none, pieces(10)).await.unwrap().0.len(), 10_000);
        assert_eq!(status(bodies.read(&none, pieces(11)).await.err().unwrap()), 413);
        let broken = futures::stream::iter([Ok(Bytes::from("x")), Err(std::io::Error::other("cut"))]);
        assert_eq!(status(bodies.read(&none, Body::from_stream(broken)).await.err().unwrap()), 400);
        let small = Bodies { steps: Arc::new(Semaphore::new(3)), each_max: 100_000 };
        let (_, held) = small.read(&none, Body::from("x".repeat(STEP * 2))).await.unwrap();
        assert_eq!(status(small.read(&none, Body::from("x".repeat(STEP * 2))).await.err().unwrap()), 503);
        assert!(small.hold(STEP).is_some() && small.hold(STEP + 1).is_none());
        drop(held);
        assert!(small.read(&none, pieces(12)).await.is_ok());
        assert_eq!(small.steps.available_permits(), 3);
    }
}
