//! Walking a path with symlinks: what is still to walk, with the bounds that every walk shares.

/// The most symlinks in one walk, as Linux has it.
const LINKS_MAX: u32 = 40;
/// The most components in one walk, those of symlink targets included: two PATH_MAX of one-letter names.
const STEPS_MAX: u32 = 4096;

/// The next component of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step<'a> {
    /// `.` or nothing between two slashes.
    Stay,
    /// `..`
    Up,
    /// A name.
    Name(&'a [u8]),
}

/// A path on the way.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    /// What is left of the path and of each symlink target that is being walked, innermost last.
    rest: Vec<&'a [u8]>,
    links: u32,
    steps: u32,
}

impl<'a> Walk<'a> {
    pub(super) fn new(path: &'a [u8]) -> Self {
        Self {
            rest: vec![path],
            links: 0,
            steps: 0,
        }
    }

    /// Takes the next component. A trailing slash counts as one more, [`Step::Stay`].
    pub(super) fn step(&mut self) -> Option<Step<'a>> {
        let path = self.rest.pop()?;
        self.steps += 1;
        let mut parts = path.splitn(2, |&byte| byte == b'/');
        let component = parts.next().unwrap_or_default();
        self.rest.extend(parts.next());
        Some(match component {
            b"" | b"." => Step::Stay,
            b".." => Step::Up,
            name => Step::Name(name),
        })
    }

    /// Whether nothing is left to walk.
    pub(super) fn is_done(&self) -> bool {
        self.rest.is_empty()
    }

    /// Goes on with a symlink's target before the rest; the caller goes to the root first if it is absolute. False when
    /// the walk has become too long: most likely a loop.
    #[must_use]
    pub(super) fn follow(&mut self, target: &'a [u8]) -> bool {
        self.links += 1;
        self.rest.push(target);
        self.links <= LINKS_MAX && self.steps <= STEPS_MAX
    }
}
