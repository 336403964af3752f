//! Whether this kernel can be relied on: tried, because versions say nothing.
//!
//! Kernels without the fix of March 2026 (eade54040384, also in some older ones) take what is missing of a read that a
//! device cut short for zeros, and keep them. So a file of two blocks is read from a device that fails in the second one:
//! that must fail, and give the right bytes when the device is well again.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use crate::error::{Error, Result};
use crate::fs::devices::Devices;
use crate::fuse::{DetachedMount, ErofsDevice, Helper, NewErofs};
use crate::image::erofs::{BLOCK_BYTES, probe};

/// What a read gave: bytes, or an errno.
type Outcome = std::result::Result<Vec<u8>, i32>;

/// Tries the kernel, with devices on `connection`, which shows `devices`, and an image in `dir`, on the disk that will have
/// the others. Blocks.
///
/// # Errors
/// Why EROFS cannot serve here, in words.
pub fn try_out(helper: &Helper, devices: &Devices, connection: &DetachedMount, dir: &Path) -> Result<()> {
    let image = image_in(dir)?;
    let device = devices.show_probe();
    let mount = helper.make_erofs(&NewErofs {
        image: image.as_fd(),
        devices: vec![ErofsDevice::Shown(device.shown().name().to_owned())],
        shown_root: connection.root(),
        source: probe::NAME.to_owned(),
        no_exec: true,
    })?;
    let (block, whole) = (BLOCK_BYTES as u32, probe::BYTES as u32);
    let ill = helper.read_in(mount.as_fd(), probe::NAME, &[(0, whole), (BLOCK_BYTES, block)])?;
    device.heal();
    let healed = helper.read_in(mount.as_fd(), probe::NAME, &[(0, whole), (BLOCK_BYTES, block)])?;
    judge(&ill, &healed)
}

/// The image, without a name.
fn image_in(dir: &Path) -> Result<File> {
    let path = dir.join(format!("erofs-{}", std::process::id()));
    let failed = |error: &std::io::Error| Error::io(path.display().to_string(), error);
    let image = fs::write(&path, probe::image()?).and_then(|()| File::open(&path));
    // Also where the disk did not take all of it.
    let _ = fs::remove_file(&path);
    image.map_err(|error| failed(&error))
}

/// Whether the reads of a whole file and of its second block gave what they must, while that block could not be read and
/// when it could again.
fn judge(ill: &[Outcome], healed: &[Outcome]) -> Result<()> {
    let unreliable = |why: &str| {
        let why = format!("{why}: its EROFS has the data bug that Linux 7.0 and later updates of others fix");
        Err(Error::unsupported("kernel mode on this kernel", why))
    };
    let content = probe::content();
    let second = content.get(BLOCK_BYTES as usize..).unwrap_or_default();
    let [whole, of_second] = ill else {
        return Err(Error::malformed("the kernel's trial", "two reads were asked for"));
    };
    // A read may give the first block, or nothing.
    if whole
        .as_ref()
        .is_ok_and(|bytes| bytes.len() as u64 > BLOCK_BYTES || !content.starts_with(bytes))
    {
        return unreliable("a read that a device cut short was filled up");
    }
    if of_second.is_ok() {
        return unreliable("a read that failed was answered");
    }
    match healed {
        [Ok(whole), Ok(of_second)] if *whole == content && of_second == second => Ok(()),
        [Ok(_), Ok(_)] => unreliable("wrong bytes were kept of a read that failed"),
        _ => Err(Error::unsupported(
            "kernel mode on this kernel",
            "a read that failed once goes on failing",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EIO: Outcome = Err(libc::EIO);

    #[test]
    fn only_a_kernel_that_fails_and_recovers_is_relied_on() {
        let content = probe::content();
        let (first, second) = content.split_at(BLOCK_BYTES as usize);
        let (first, second) = (first.to_vec(), second.to_vec());
        let zeros = vec![0; second.len()];
        let filled_up = [&first[..], &zeros].concat();
        let healed = [Ok(content.clone()), Ok(second.clone())];

        judge(&[Ok(first.clone()), EIO], &healed).unwrap();
        judge(&[EIO, EIO], &healed).unwrap();
        for (ill, healed) in [
            ([Ok(filled_up.clone()), EIO], healed.clone()),
            ([Ok(zeros.clone()), EIO], healed.clone()),
            ([Ok(first.clone()), Ok(zeros.clone())], healed.clone()),
            ([Ok(first.clone()), Ok(Vec::new())], healed.clone()),
            ([Ok(first.clone()), EIO], [Ok(filled_up), Ok(zeros.clone())]),
            ([EIO, EIO], [Ok(content.clone()), Ok(zeros)]),
            ([EIO, EIO], [Ok(first), EIO]),
        ] {
            let error = judge(&ill, &healed).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
        }
        assert!(judge(&[], &healed).is_err());
    }
}
