//! Wires the layers below together: configuration into store, registry client, images and trees.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::runtime::Handle;

pub(super) use super::placeholder::{Images, unmount_path};
use super::placeholder::{Mount, new_images};
use super::protocol::MountRequest;
use crate::config::Config;
use crate::error::{Error, Result};
pub(super) use crate::image::platform::Platform;
use crate::store::Store;
use crate::store::lock::Lock;

/// Everything that works on one store.
#[derive(Debug)]
pub(super) struct Engine {
    store: Arc<Store>,
    images: Arc<Images>,
    handle: Handle,
}

impl Engine {
    /// Opens the store whose lock was taken and sets up what works on it. A credential goes to `credential_host` alone
    /// where one is named, else to the hosts that the configuration names, else to every registry that asks for one.
    ///
    /// # Errors
    /// What the store and the client find wrong.
    pub(super) fn open(
        config: &Config,
        lock: Lock,
        _credential_host: Option<&str>,
        handle: &Handle,
    ) -> Result<Self> {
        let store = Store::open_locked(&config.cache_dir, lock)?;
        Ok(Self {
            images: new_images(),
            store,
            handle: handle.clone(),
        })
    }

    /// The images.
    pub(super) fn images(&self) -> &Arc<Images> {
        &self.images
    }

    /// Notes in the lock where this process listens.
    pub(super) fn publish(&self, socket: Option<&Path>) -> Result<()> {
        self.store.lock().note(socket)
    }

    /// The state of cache, transfers and hosts, an object.
    pub(super) fn status(&self) -> Value {
        let mut status = self.images.status();
        if let Some(fields) = status.as_object_mut() {
            fields.insert("store".to_owned(), json!(self.store.dir()));
        }
        status
    }

    /// Mounts a tree. Blocks until it answers or cannot. `status` makes the content of `status.json`.
    pub(super) fn mount(
        &self,
        request: &MountRequest,
        _status: Arc<dyn Fn() -> String + Send + Sync>,
    ) -> Result<Mounted> {
        let platform: Platform = match &request.platform {
            Some(text) => text.parse()?,
            None => Platform::host(),
        };
        tracing::debug!(%platform, "mount");
        Ok(Mounted {
            mount: Mount::start(&request.mountpoint, &self.handle)?,
        })
    }

    /// Brings the store into the state that the next start trusts. Nothing may use the images any more.
    pub(super) fn close(&self) {
        self.store.close();
    }
}

/// A tree and its mount. Dropping it unmounts, lazily if need be: nothing may be left without someone who answers.
#[derive(Debug)]
pub(super) struct Mounted {
    mount: Mount,
}

impl Mounted {
    /// Unmounts; blocks. A busy mount is [`Error::Busy`] naming who is busy, unless `lazy`.
    pub(super) fn unmount(&self, lazy: bool) -> Result<()> {
        self.mount.unmount(lazy)
    }

    /// Waits until the kernel has ended the session, whoever unmounted.
    pub(super) async fn ended(&self) {
        let mut ended = self.mount.ended();
        // A sender that is gone has ended too.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// The requests that reached the daemon, by operation.
    pub(super) fn counters(&self) -> Value {
        self.mount.counters()
    }

    /// The last failed operations.
    pub(super) fn errors(&self) -> Vec<Value> {
        Vec::new()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.mount.unmount(true) {
            tracing::debug!(%error, "unmounted already");
        }
    }
}

/// Unmounts what no daemon answers for any more; anything that is not a registryfs mount is left alone.
pub(super) fn unmount_dead(mountpoint: &Path) -> Result<()> {
    unmount_path(mountpoint, true).map_err(|error| match error {
        Error::NotFound { .. } => Error::not_found(
            mountpoint.display().to_string(),
            "no registryfs filesystem is mounted there",
        ),
        other => other,
    })
}
