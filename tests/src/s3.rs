//! An S3 server on loopback, over a folder: a real one (s3s-fs), with signatures and conditional creates.

use std::net::SocketAddr;
use std::path::Path;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
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
    /// Serves `folder` in the current runtime, at `address` (port 0: any).
    pub async fn start(folder: &Path, address: &str) -> Self {
        std::fs::create_dir_all(folder.join(BUCKET)).unwrap();
        let mut service = S3ServiceBuilder::new(FileSystem::new(folder).unwrap());
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = service.build();
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
