//! Mounts that are made step by step and attached nowhere (fsopen(2), fsconfig(2), fsmount(2)).

use std::io;
use std::os::fd::OwnedFd;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use crate::error::{Error, Result};

/// The longest value that the kernel takes, in bytes: fsconfig(2) copies 256, with the NUL.
pub(super) const VALUE_BYTES_MAX: usize = 255;
/// How many messages of the kernel are told. It keeps 8.
const MESSAGES_MAX: usize = 8;

/// A mount in the making.
#[derive(Debug)]
pub(super) struct NewMount {
    fs_type: &'static str,
    context: OwnedFd,
}

impl NewMount {
    /// Begins a mount of this type.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has no such type, or none can be mounted here.
    pub(super) fn of(fs_type: &'static str) -> Result<Self> {
        let context = fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| {
            let why = match io::Error::from(errno).raw_os_error() {
                Some(libc::ENODEV) => format!("the kernel has no {fs_type}; try: modprobe {fs_type}"),
                Some(libc::ENOSYS) => {
                    "the kernel is older than 5.2, or a sandbox forbids fsopen(2)".to_owned()
                }
                Some(libc::EPERM | libc::EACCES) => {
                    "only root with CAP_SYS_ADMIN can, which a container often lacks".to_owned()
                }
                _ => format!("fsopen: {errno}"),
            };
            Error::unsupported(format!("mounting {fs_type}"), why)
        })?;
        Ok(Self { fs_type, context })
    }

    /// Sets a parameter to a value.
    pub(super) fn set(&self, key: &str, value: &str) -> Result<()> {
        if value.len() > VALUE_BYTES_MAX {
            let what = format!("mounting {}: {key}={value}", self.fs_type);
            return Err(Error::posix(what, libc::ENAMETOOLONG));
        }
        fsconfig_set_string(&self.context, key, value)
            .map_err(|errno| self.failed(&format!("{key}={value}"), errno))
    }

    /// Makes the superblock, and a mount of it.
    pub(super) fn make(self, attributes: MountAttrFlags) -> Result<OwnedFd> {
        fsconfig_create(&self.context).map_err(|errno| self.failed("making it", errno))?;
        fsmount(&self.context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|errno| self.failed("fsmount", errno))
    }

    /// What failed, with what the kernel says about it.
    fn failed(&self, step: &str, errno: rustix::io::Errno) -> Error {
        let error = io::Error::from(errno);
        let said = self.messages();
        let why = if said.is_empty() {
            error.to_string()
        } else {
            format!("{error}: {}", said.join("; "))
        };
        Error::Io {
            what: format!("mounting {}: {step}", self.fs_type),
            errno: error.raw_os_error().unwrap_or(0),
            why,
        }
    }

    /// The kernel's messages, one a read, each behind a letter for its level.
    fn messages(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0; 512];
        while messages.len() < MESSAGES_MAX {
            match rustix::io::read(&self.context, &mut buffer) {
                Ok(length) if length > 0 => {
                    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
                    let text = text.trim();
                    messages.push(text.split_once(' ').map_or(text, |(_, said)| said).to_owned());
                }
                _ => break,
            }
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_that_is_not_there_is_named_with_the_remedy() {
        let error = NewMount::of("nosuchfs").unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    }
}
