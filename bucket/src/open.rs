//! Opening a store by its URL: S3 and what speaks like it, GCS, Azure, a local path.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientConfigKey, ObjectStore, ObjectStoreScheme, RetryConfig};
use url::Url;

use super::folder::{Folder, is_local};
use super::swap::SwapConnector;

/// Where the blocks go, as an operator writes it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ObjectUrl {
    /// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `file:///path`.
    pub url: String,
    /// The client's options beside those of the environment: `("aws_endpoint", "http://127.0.0.1:9000")`.
    pub options: Vec<(String, String)>,
}

/// A store, and what of it is ours.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// Our prefix in it.
    pub prefix: Path,
}

/// What is wrong with a URL or an option.
#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    /// The URL.
    #[error(
        "{url:?} cannot be used: {problem}; use s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///path"
    )]
    Url {
        /// As written.
        url: String,
        /// Why.
        problem: String,
    },
    /// An option.
    #[error("this kind of store has no option {0:?}")]
    Option(String),
    /// The client cannot be made.
    #[error("{0}")]
    Client(#[from] object_store::Error),
}

/// The client's own: one try a request, since ours are counted and end by a deadline; our own time limits.
const CLIENT: [(ClientConfigKey, &str); 3] = [
    (ClientConfigKey::ConnectTimeout, "3 seconds"),
    (ClientConfigKey::Timeout, "300 seconds"),
    (ClientConfigKey::PoolIdleTimeout, "30 seconds"),
];

fn one_try() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: Duration::from_secs(300) }
}

macro_rules! configured {
    ($builder:ident, $key:path, $url:expr, $options:expr) => {{
        let mut builder = $builder::from_env().with_url($url.as_str()).with_retry(one_try());
        builder = builder.with_http_connector(SwapConnector);
        for (key, value) in CLIENT {
            builder = builder.with_config(<$key>::Client(key), value);
        }
        for (name, value) in $options {
            let key = name.to_ascii_lowercase().parse().map_err(|_| OpenStoreError::Option(name.clone()))?;
            builder = builder.with_config(key, value);
        }
        builder
    }};
}

impl ObjectUrl {
    /// Whether it is a folder on a file system of this machine: what was written there is what was handed over, or an error.
    pub fn is_local_disk(&self) -> bool {
        self.folder().is_some_and(|folder| is_local(&folder))
    }

    /// The folder that it is, if it is one.
    pub fn folder(&self) -> Option<PathBuf> {
        let url = Url::parse(&self.url).ok().filter(|url| url.scheme() == "file")?;
        url.to_file_path().ok()
    }

    /// Makes the client; asks nothing of the store.
    pub fn open(&self) -> Result<Opened, OpenStoreError> {
        let wrong = |problem: String| OpenStoreError::Url { url: self.url.clone(), problem };
        let url = Url::parse(&self.url).map_err(|error| wrong(error.to_string()))?;
        let (scheme, prefix) = ObjectStoreScheme::parse(&url).map_err(|error| wrong(error.to_string()))?;
        // Whoever came first has set it already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let options = self.options.iter();
        let store: Arc<dyn ObjectStore> = match scheme {
            ObjectStoreScheme::AmazonS3 => {
                Arc::new(configured!(AmazonS3Builder, AmazonS3ConfigKey, url, options).build()?)
            }
            ObjectStoreScheme::GoogleCloudStorage => {
                let builder = configured!(GoogleCloudStorageBuilder, object_store::gcp::GoogleConfigKey, url, options);
                Arc::new(builder.build()?)
            }
            ObjectStoreScheme::MicrosoftAzure => {
                let builder = configured!(MicrosoftAzureBuilder, object_store::azure::AzureConfigKey, url, options);
                Arc::new(builder.build()?)
            }
            ObjectStoreScheme::Local => {
                if let Some((name, _)) = self.options.first() {
                    return Err(OpenStoreError::Option(name.clone()));
                }
                if prefix.as_ref().is_empty() {
                    return Err(wrong("it is the root of the file system".into()));
                }
                // A write is acknowledged as DURABLE: it must be on the disk.
                Arc::new(Folder::new())
            }
            _ => return Err(wrong("this build does not know such a store".into())),
        };
        Ok(Opened { store, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(url: &str, options: &[(&str, &str)]) -> Result<Opened, OpenStoreError> {
        let options = options.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        ObjectUrl { url: url.into(), options }.open()
    }

    #[test]
    fn a_local_disk_is_a_folder_here() {
        let is_local = |url: &str| ObjectUrl { url: url.into(), options: Vec::new() }.is_local_disk();
        assert!(
            is_local("file:///dev/shm/a%20b")
                && !is_local("s3://dev/shm")
                && !is_local("file:///proc/x")
                && !is_local("")
        );
    }

    #[test]
    fn urls_are_understood_or_refused_by_name() {
        assert_eq!(open("file:///data/kv", &[]).unwrap().prefix, Path::from("data/kv"));
        let s3 = open("s3://bucket/a/b", &[("aws_region", "eu-west-1"), ("aws_allow_http", "true")]).unwrap();
        assert_eq!(s3.prefix, Path::from("a/b"));
        assert_eq!(open("gs://bucket/a", &[]).unwrap().prefix, Path::from("a"));
        let azure = open("az://container/a", &[("azure_storage_account_name", "me")]).unwrap();
        assert_eq!(azure.prefix, Path::from("a"));
        for bad in ["", "bucket", "file:///", "ftp://x/y", "http://host/bucket", "memory:///"] {
            let error = open(bad, &[]).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")) && error.contains("s3://bucket"), "{bad}: {error}");
        }
        let error = open("s3://bucket", &[("aws_regoin", "x")]).unwrap_err();
        assert!(error.to_string().contains("\"aws_regoin\""), "{error}");
    }
}
