//! What every command starts from: the global options and the settings.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::globals::Globals;
use super::output::note;
use super::progress::show_passes;
use crate::config::{Config, Environment, Layer, Loaded};
use crate::daemon::{ImageName, Session};
use crate::error::{Error, Result};
use crate::image::platform::Platform;
use crate::registry::reference::canonical_host;

/// The surroundings of a command.
#[derive(Debug)]
pub(super) struct Context {
    /// The global options.
    pub(super) globals: Globals,
    /// The settings.
    pub(super) loaded: Loaded,
}

impl Context {
    /// Loads the settings.
    pub(super) fn new(globals: &Globals) -> Result<Self> {
        let context = Self {
            globals: globals.clone(),
            loaded: load(globals, Layer::default())?,
        };
        context.check()?;
        Ok(context)
    }

    /// Lays a command's own options over everything else.
    pub(super) fn with(&mut self, options: Layer) -> Result<()> {
        self.loaded = load(&self.globals, options)?;
        self.check()
    }

    /// Checks what the configuration itself cannot: it knows neither platforms nor hosts.
    fn check(&self) -> Result<()> {
        if let Some(text) = &self.loaded.config.platform {
            text.parse::<Platform>()?;
        }
        for (host, file) in &self.loaded.registry_files {
            canonical_host(host)
                .map_err(|error| Error::usage(format!("{}: [registry.{host:?}]: {error}", file.display())))?;
        }
        for name in self.loaded.config.layouts.keys() {
            canonical_host(name).map_err(|error| Error::usage(format!("[layout.{name:?}]: {error}")))?;
        }
        Ok(())
    }

    /// Someone who answers questions.
    pub(super) fn session(&self) -> Session {
        Session::new(&self.loaded, note).showing(show_passes(&self.globals))
    }

    /// A reference together with the platform to choose.
    pub(super) fn image(&self, reference: &str) -> ImageName {
        ImageName {
            reference: reference.to_owned(),
            platform: self.loaded.config.platform.clone(),
        }
    }
}

fn load(globals: &Globals, options: Layer) -> Result<Loaded> {
    let flags = options.over(globals.layer()).of_flags()?;
    Config::load(&Environment::of_process(), globals.config.as_deref(), flags)
}

/// A path in an image, the root where none was given.
pub(super) fn path_bytes(path: Option<&OsString>) -> Vec<u8> {
    path.map_or_else(|| b"/".to_vec(), |path| path.clone().into_vec())
}
