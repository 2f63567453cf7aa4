//! An S3 server on loopback, over a folder: a real one (s3s-fs), with signatures and conditional creates. It compares each body with
//! the SHA-256 of its signature, and refuses another one as AWS does; or it looks at no signature at all, as some servers may be set
//! up.

use std::net::SocketAddr;
use std::path::Path;

use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::HttpError;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The one key that it knows.
pub const ACCESS_KEY: &str = "kvstore-test";
/// Its secret.
pub const SECRET_KEY: &str = "kvstore-test-secret";
/// The one bucket that it has.
pub const BUCKET: &str = "blocks";

/// What a server does with the checksum that comes with a body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksums {
    /// It compares.
    Compared,
    /// It takes what comes.
    Ignored,
}

/// It runs until it is dropped.
pub struct S3Server {
    /// Where it listens.
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl S3Server {
    /// Serves `folder` in the current runtime, at `address` (port 0: any), and compares checksums.
    pub async fn start(folder: &Path, address: &str) -> Self {
        Self::start_with(folder, address, Checksums::Compared).await
    }

    /// The same, with a server that may take what comes.
    pub async fn start_with(folder: &Path, address: &str, checksums: Checksums) -> Self {
        std::fs::create_dir_all(folder.join(BUCKET)).unwrap();
        let mut service = S3ServiceBuilder::new(FileSystem::new(folder).unwrap());
        if checksums == Checksums::Compared {
            service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        }
        let s3 = service.build();
        // What fails in it when an object is written is a body that is not the one that was signed. It calls that its own error (500);
        // AWS, MinIO and others call it the request's.
        let service = service_fn(move |mut request: Request<Incoming>| {
            if checksums == Checksums::Ignored {
                request.headers_mut().remove(http::header::AUTHORIZATION);
                request.headers_mut().remove("x-amz-content-sha256");
            }
            let (s3, is_write) = (s3.clone(), request.method() == Method::PUT);
            async move {
                let mut answer = Service::call(&s3, request).await?;
                if is_write && answer.status() == StatusCode::INTERNAL_SERVER_ERROR {
                    *answer.status_mut() = StatusCode::BAD_REQUEST;
                }
                Ok::<_, HttpError>(answer)
            }
        });
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let http = Builder::new(TokioExecutor::new());
            while let Ok((socket, _)) = listener.accept().await {
                let _ = socket.set_nodelay(true);
                let connection = http.serve_connection(TokioIo::new(socket), service.clone()).into_owned();
                tokio::spawn(async move {
                    // A client that went away is no failure of a test.
                    let _ = connection.await;
                });
            }
        });
        Self { address, task }
    }
}

/// The settings of a daemon whose bucket is at `address`, below `prefix`.
pub fn settings(address: SocketAddr, prefix: &str) -> Vec<String> {
    let options = [
        format!("aws_endpoint=http://{address}"),
        "aws_allow_http=true".into(),
        "aws_region=us-east-1".into(),
        format!("aws_access_key_id={ACCESS_KEY}"),
        format!("aws_secret_access_key={SECRET_KEY}"),
    ];
    vec![format!("object.url=s3://{BUCKET}/{prefix}"), format!("object.options={}", options.join(","))]
}
