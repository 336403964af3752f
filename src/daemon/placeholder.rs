//! Stand-ins for the modules below that are not merged yet.
#![allow(missing_docs, clippy::unused_async, dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::image::answers::{FileInfo, ImageInfo, Listing, Resolved};
use crate::image::platform::Platform;
use crate::registry::reference::{Reference, Repository};

fn missing<T>() -> Result<T> {
    Err(Error::unsupported("images", "not merged yet"))
}

#[derive(Debug)]
pub(super) struct Images;

#[derive(Debug)]
pub(super) struct FileHandle;

impl FileHandle {
    pub(super) fn size(&self) -> u64 {
        0
    }
    pub(super) async fn read(&self, _: u64, _: usize) -> Result<Vec<u8>> {
        missing()
    }
}

impl Images {
    pub(super) async fn repos(&self, _: &str) -> Result<Listing> {
        missing()
    }
    pub(super) async fn tags(&self, _: &Repository) -> Result<Listing> {
        missing()
    }
    pub(super) async fn resolve(&self, _: &Reference) -> Result<Resolved> {
        missing()
    }
    pub(super) async fn manifest(&self, _: &Reference) -> Result<Bytes> {
        missing()
    }
    pub(super) async fn config(&self, _: &Reference, _: &Platform) -> Result<Bytes> {
        missing()
    }
    pub(super) async fn info(&self, _: &Reference, _: &Platform) -> Result<ImageInfo> {
        missing()
    }
    pub(super) async fn file_info(&self, _: &Reference, _: &Platform, _: &[u8]) -> Result<FileInfo> {
        missing()
    }
    pub(super) async fn ls(&self, _: &Reference, _: &Platform, _: &[u8]) -> Result<Vec<FileInfo>> {
        missing()
    }
    pub(super) async fn open_file(&self, _: &Reference, _: &Platform, _: &[u8]) -> Result<FileHandle> {
        missing()
    }
    pub(super) fn status(&self) -> serde_json::Value {
        serde_json::json!({"cache": {}, "hosts": {}})
    }
}

#[derive(Debug)]
pub(super) struct Mount {
    path: PathBuf,
    end: watch::Sender<bool>,
}

impl Mount {
    pub(super) fn start(path: &Path, _: &Handle) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            end: watch::channel(false).0,
        })
    }
    pub(super) fn unmount(&self, _lazy: bool) -> Result<()> {
        tracing::debug!(path = %self.path.display(), "unmount");
        self.end.send_replace(true);
        Ok(())
    }
    pub(super) fn ended(&self) -> watch::Receiver<bool> {
        self.end.subscribe()
    }
    pub(super) fn counters(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

pub(super) fn unmount_path(path: &Path, _lazy: bool) -> Result<()> {
    Err(Error::not_found(path.display().to_string(), "not mounted"))
}

pub(super) fn new_images() -> Arc<Images> {
    Arc::new(Images)
}
