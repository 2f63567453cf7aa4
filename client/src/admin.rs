//! The calls that an operator makes.

use std::collections::HashMap;

use kvstore_proto::v1::admin_client::AdminClient;
use kvstore_proto::v1::{
    AccessesChunk, AccessesRequest, CollectProgress, CollectRequest, DrainRequest, DrainResponse, GetConfigRequest,
    ReloadConfigRequest, SetConfigRequest, StatusRequest, StatusResponse, VerifyProgress, VerifyRequest,
};

use crate::connection::Connection;
use crate::{Client, Error};

impl Client {
    async fn admin(&self) -> Result<AdminClient<Connection>, Error> {
        Ok(AdminClient::with_origin(self.connection().await?, self.origin()))
    }

    /// The daemon at this moment.
    pub async fn status(&self) -> Result<StatusResponse, Error> {
        self.within(async { Ok(self.admin().await?.status(StatusRequest {}).await?.into_inner()) }).await
    }

    /// The configuration in force, as TOML.
    pub async fn config(&self) -> Result<String, Error> {
        self.within(async { Ok(self.admin().await?.get_config(GetConfigRequest {}).await?.into_inner().toml) }).await
    }

    /// Changes keys that may change live, all or none; a line for each change.
    pub async fn set_config(&self, values: HashMap<String, String>) -> Result<Vec<String>, Error> {
        let request = SetConfigRequest { values };
        self.within(async { Ok(self.admin().await?.set_config(request).await?.into_inner().changes) }).await
    }

    /// Has the daemon read its configuration again.
    pub async fn reload_config(&self) -> Result<Vec<String>, Error> {
        self.within(async { Ok(self.admin().await?.reload_config(ReloadConfigRequest {}).await?.into_inner().changes) })
            .await
    }

    /// Has the daemon refuse new work and finish what is in flight; `deadline_ms` 0 means the configured.
    pub async fn drain(&self, deadline_ms: u32) -> Result<DrainResponse, Error> {
        let request = DrainRequest { deadline_ms };
        self.within(async { Ok(self.admin().await?.drain(request).await?.into_inner()) }).await
    }

    /// Has the daemon check every block; `report` sees each step. The last step.
    pub async fn verify(&self, mut report: impl FnMut(&VerifyProgress)) -> Result<VerifyProgress, Error> {
        let mut steps =
            self.within(async { Ok(self.admin().await?.verify(VerifyRequest {}).await?.into_inner()) }).await?;
        let mut last = VerifyProgress::default();
        while let Some(step) = self.within(async { Ok(steps.message().await?) }).await? {
            report(&step);
            last = step;
        }
        if last.done { Ok(last) } else { Err(Error::Unavailable("the verification was cut off".into())) }
    }

    /// Has the daemon collect garbage in the object store; `report` sees each step. The last step.
    pub async fn collect(
        &self,
        request: CollectRequest,
        mut report: impl FnMut(&CollectProgress),
    ) -> Result<CollectProgress, Error> {
        let mut steps = self.within(async { Ok(self.admin().await?.collect(request).await?.into_inner()) }).await?;
        let mut last = CollectProgress::default();
        // A bucket is listed as fast as its store does, and may be large: no deadline but the daemon's own.
        while let Some(step) = steps.message().await? {
            report(&step);
            last = step;
        }
        if last.done { Ok(last) } else { Err(Error::Unavailable("the collection was cut off".into())) }
    }

    /// The daemon's sampled accesses; `each` takes them piece by piece, oldest first.
    pub async fn accesses(&self, mut each: impl FnMut(AccessesChunk)) -> Result<(), Error> {
        let mut chunks =
            self.within(async { Ok(self.admin().await?.accesses(AccessesRequest {}).await?.into_inner()) }).await?;
        while let Some(chunk) = self.within(async { Ok(chunks.message().await?) }).await? {
            each(chunk);
        }
        Ok(())
    }
}
