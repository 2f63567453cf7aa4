//! The object store's part of the configuration.

use std::str::FromStr;

use bytesize::ByteSize;
use kvstore_tiers::admission::Admission;
use kvstore_tiers::host::HostLimits;
use kvstore_tiers::object::{ObjectLimits, ObjectUrl, Verify};

use super::raw::{RawObject, duration, size_or_auto};
use super::{ConfigError, NvmeConfig, ObjectConfig, invalid};

/// Options of a store, each as KEY=VALUE.
pub(super) fn options(key: &str, options: &[String]) -> Result<Vec<(String, String)>, ConfigError> {
    let pair = |option: &String| {
        let pair = option.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        pair.ok_or_else(|| invalid(key, format!("{option:?} is not of the form KEY=VALUE")))
    };
    options.iter().filter(|option| !option.is_empty()).map(pair).collect()
}

impl RawObject {
    pub(super) fn check(
        &self,
        host: &HostLimits,
        nvme: Option<&NvmeConfig>,
    ) -> Result<Option<ObjectConfig>, ConfigError> {
        let uploads = Admission::from_str(&self.upload).map_err(|problem| invalid("object.upload", problem))?;
        let verify = match self.verify.as_str() {
            "probe" => Verify::Probe,
            "always" => Verify::Always,
            "never" => Verify::Never,
            text => {
                let problem = format!("{text:?} is none of \"probe\", \"always\" and \"never\"");
                return Err(invalid("object.verify", problem));
            }
        };
        let stall = duration("object.stall", &self.stall)?;
        if self.url == "off" {
            return Ok(None);
        }
        let url = ObjectUrl { url: self.url.clone(), options: options("object.options", &self.options)? };
        let upload_bytes = size_or_auto("object.upload_bytes", &self.upload_bytes)?.unwrap_or(host.bytes / 8);
        if upload_bytes == 0 || upload_bytes > host.bytes / 2 {
            let most = ByteSize(host.bytes / 2);
            let problem =
                format!("{} is out of range: it must be 1 byte to half of host.bytes, {most}", ByteSize(upload_bytes));
            return Err(invalid("object.upload_bytes", problem));
        }
        let disk_bytes = nvme.map_or(0, |nvme| nvme.bytes * nvme.paths.len() as u64);
        let auto = if nvme.is_some() { disk_bytes / 4 } else { upload_bytes };
        let backlog_bytes = size_or_auto("object.backlog_bytes", &self.backlog_bytes)?.unwrap_or(auto);
        if nvme.is_some() && backlog_bytes > disk_bytes / 2 {
            let most = ByteSize(disk_bytes / 2);
            let problem =
                format!("{} is too large: it must be at most half of the Nvme tier, {most}", ByteSize(backlog_bytes));
            return Err(invalid("object.backlog_bytes", problem));
        }
        let limits = ObjectLimits { upload_bytes, backlog_bytes };
        let keep_age = match self.keep_age.as_str() {
            "off" => None,
            text => Some(humantime::parse_duration(text).map_err(|_| {
                invalid("object.keep_age", format!("{text:?} is neither \"off\" nor a duration such as \"30days\""))
            })?),
        };
        let keep_bytes = match self.keep_bytes.as_str() {
            "off" => None,
            text => size_or_auto("object.keep_bytes", text).ok().flatten().map(Some).ok_or_else(|| {
                invalid("object.keep_bytes", format!("{text:?} is neither \"off\" nor a size such as \"10TiB\""))
            })?,
        };
        Ok(Some(ObjectConfig { url, uploads, limits, verify, stall, keep_age, keep_bytes }))
    }
}
