//! An Azure Blob store on loopback: Azurite, Microsoft's emulator, where it is installed (`make test` does).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use sha2::{Digest, Sha256};

/// The account that every Azurite has, and its key: both are published.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
const CONTAINER: &str = "blocks";
const VERSION: &str = "2021-08-06";

/// It runs until it is dropped.
pub struct Azurite {
    /// Where it listens.
    pub address: SocketAddr,
    child: Child,
}

impl Drop for Azurite {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Its program, where it is installed.
pub fn program() -> Option<PathBuf> {
    let named = std::env::var_os("KVSTORE_AZURITE").map(PathBuf::from);
    named.filter(|program| program.is_file())
}

impl Azurite {
    /// Starts it over `folder`, with one empty container.
    pub async fn start(program: &Path, folder: &Path) -> Self {
        // It wants a number: one that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(program)
            .args(["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobHost", "127.0.0.1", "--location"])
            .arg(folder)
            .args(["--blobPort", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let azurite = Self { address: SocketAddr::from(([127, 0, 0, 1], port)), child };
        let begun = Instant::now();
        while !azurite.makes_container().await {
            assert!(begun.elapsed() < Duration::from_secs(60), "Azurite does not answer");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        azurite
    }

    async fn makes_container(&self) -> bool {
        let date = http_date();
        let to_sign = format!(
            "PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{VERSION}\n/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        );
        let key = BASE64_STANDARD.decode(KEY).unwrap();
        let signature = BASE64_STANDARD.encode(hmac_sha256(&key, to_sign.as_bytes()));
        let request = http::Request::put(format!("http://{}/{ACCOUNT}/{CONTAINER}?restype=container", self.address))
            .header("x-ms-date", date)
            .header("x-ms-version", VERSION)
            .header("authorization", format!("SharedKey {ACCOUNT}:{signature}"))
            .header("content-length", "0")
            .body(Full::new(Bytes::new()))
            .unwrap();
        let client = Client::builder(TokioExecutor::new()).build_http();
        client.request(request).await.is_ok_and(|answer| answer.status().is_success())
    }

    /// The settings of a daemon whose bucket is this one, below `prefix`.
    pub fn settings(&self, prefix: &str) -> Vec<String> {
        let options = [
            format!("azure_endpoint=http://{}/{ACCOUNT}", self.address),
            format!("azure_storage_account_name={ACCOUNT}"),
            format!("azure_storage_account_key={KEY}"),
            "azure_allow_http=true".into(),
        ];
        vec![format!("object.url=az://{CONTAINER}/{prefix}"), format!("object.options={}", options.join(","))]
    }
}

/// RFC 2104.
fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut block = [0u8; 64];
    block[..key.len().min(64)].copy_from_slice(&key[..key.len().min(64)]);
    let with = |pad: u8| block.map(|byte| byte ^ pad);
    let inner = Sha256::new().chain_update(with(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(with(0x5c)).chain_update(inner).finalize().to_vec()
}

fn http_date() -> String {
    let output = Command::new("date").args(["-u", "+%a, %d %b %Y %H:%M:%S GMT"]).env("LC_ALL", "C").output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
