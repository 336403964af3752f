//! The process that owns a store: its lifecycle, the mounts it holds, and the control socket through which every other
//! process of the user reaches it.
//!
//! One process at a time works on a store, and the store's lock says which. A command therefore first looks for a
//! daemon to ask (`socket` says where it listens), and works itself, holding the lock, where there is none
//! (`session`). Both ways run the same code on the same questions (`query`), so an answer does not depend on who
//! gave it. `mount` starts a daemon where none runs (`spawn`); of two that start at once the lock picks one, and the
//! other's command turns to the winner.

mod connection;
mod control;
mod descriptors;
mod endpoints;
mod engine;
pub mod log;
mod memory;
mod mounted;
mod mounts;
mod protocol;
mod query;
mod run;
mod server;
mod service;
mod session;
mod socket;
mod source;
mod spawn;

pub use control::{mount, unmount, unmount_dead};
pub use engine::client;
pub use protocol::MountRequest;
pub use query::{ImageName, Query};
pub use run::{SHUTDOWN_WITHIN, allow_other_default, daemon, foreground, runtime, spawned};
pub use session::Session;
pub use source::{MountSource, layout_parts};
