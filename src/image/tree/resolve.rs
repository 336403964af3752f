//! Walking a path inside an image as a process in a chroot on it would: for the commands that name a file of an image
//! without a mount. Under a mount the kernel walks.

use std::ops::Deref;

use crate::error::{Error, Result};
use crate::image::tree::read::Tree;
use crate::image::tree::walk::{Step, Walk};
use crate::image::tree::{Node, ROOT, damaged};
use crate::layer::entry::Kind;

impl<B: Deref<Target = [u8]>> Tree<B> {
    /// The inode at `path`, with or without a leading slash; the empty path is the root. Absolute symlinks start at the
    /// image's root and `..` stays in it. A symlink at the very end is followed if `follow_last` or if a slash comes
    /// after it.
    ///
    /// # Errors
    /// [`Error::NotFound`], `ENOTDIR` or, after 40 symlinks, `ELOOP`, naming the path; [`Error::Malformed`] for a damaged
    /// tree.
    pub fn resolve(&self, path: &[u8], follow_last: bool) -> Result<u32> {
        self.walk(ROOT, path, follow_last, &mut |_, _, _| {})
    }

    /// The inode that a symlink in directory `dir` leads to; none where it leads nowhere. `passed` is told each name on
    /// the way that is no directory, the last one included: the directory that it is in, the name, and its inode.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged tree.
    pub fn follow(
        &self,
        dir: u32,
        link: &Node,
        passed: &mut dyn FnMut(u32, &[u8], u32),
    ) -> Result<Option<u32>> {
        let target = self.link(link)?;
        let from = if target.starts_with(b"/") { ROOT } else { dir };
        match self.walk(from, target, true, passed) {
            Ok(end) => Ok(Some(end)),
            Err(Error::NotFound { .. } | Error::Posix { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn walk(
        &self,
        from: u32,
        path: &[u8],
        follow_last: bool,
        passed: &mut dyn FnMut(u32, &[u8], u32),
    ) -> Result<u32> {
        let shown = || String::from_utf8_lossy(path).into_owned();
        let mut walk = Walk::new(path);
        let mut at = from;
        while let Some(step) = walk.step() {
            let dir = self.node(at)?;
            if !dir.is_dir() {
                return Err(Error::posix(shown(), libc::ENOTDIR));
            }
            let name = match step {
                Step::Stay => continue,
                Step::Up => {
                    at = dir.parent;
                    continue;
                }
                Step::Name(name) => name,
            };
            let child = self.lookup(at, name)?.ok_or_else(|| {
                let name = String::from_utf8_lossy(name);
                Error::not_found(shown(), format!("the image has no {name:?} there"))
            })?;
            let node = self.node(child)?;
            if !node.is_dir() {
                passed(at, name, child);
            }
            if node.kind != Kind::Symlink || (walk.is_done() && !follow_last) {
                at = child;
                continue;
            }
            let target = self.link(&node)?;
            if target.is_empty() {
                return Err(damaged("a symlink without a target"));
            }
            if !walk.follow(target) {
                return Err(Error::posix(shown(), libc::ELOOP));
            }
            if target.starts_with(b"/") {
                at = ROOT;
            }
        }
        Ok(at)
    }
}
