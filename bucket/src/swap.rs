//! What is done to requests below everything that signs them: the status of an answer is kept, which errors do not tell, and a body
//! can be another one when it arrives.
//!
//! The latter is how a probe finds out whether a store compares what it receives with the
//! checksum that came with it. The body is swapped below everything that signs requests or computes checksums, where a network
//! would damage it, so that the answer holds for uploads as they are sent, whatever the client is told to send with them.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use object_store::{ClientOptions, PutPayload};

/// The answer to a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Answered {
    /// The store is none that is asked over HTTP.
    NoHttp,
    /// None came.
    No,
    /// This HTTP status.
    Status(u16),
}

/// Goes with a request in its extensions: what arrives instead of its body, if anything, and what the store answers.
#[derive(Clone, Debug, Default)]
pub(super) struct Swap {
    arrives: Option<PutPayload>,
    /// 0 until the request is sent, 1 until it is answered.
    status: Arc<AtomicU16>,
}

impl Swap {
    /// This arrives instead.
    pub fn new(arrives: PutPayload) -> Self {
        Self { arrives: Some(arrives), ..Self::default() }
    }

    /// What the store answered.
    pub fn answered(&self) -> Answered {
        match self.status.load(Ordering::Acquire) {
            0 => Answered::NoHttp,
            1 => Answered::No,
            status => Answered::Status(status),
        }
    }
}

/// Makes clients that do as a [`Swap`] says, and are the usual ones otherwise.
#[derive(Debug)]
pub(super) struct SwapConnector;

#[derive(Debug)]
struct SwapService(HttpClient);

impl HttpConnector for SwapConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(SwapService(client)))
    }
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'a>>;

impl HttpService for SwapService {
    fn call<'a, 'b>(&'a self, mut request: HttpRequest) -> Answer<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let swap = request.extensions_mut().remove::<Swap>();
            if let Some(swap) = &swap {
                swap.status.store(1, Ordering::Release);
                if let Some(arrives) = &swap.arrives {
                    *request.body_mut() = arrives.clone().into();
                }
            }
            let answer = self.0.execute(request).await?;
            if let Some(swap) = swap {
                swap.status.store(answer.status().as_u16(), Ordering::Release);
            }
            Ok(answer)
        })
    }
}
