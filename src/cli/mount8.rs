//! This program as the helper that mount(8) and umount(8), and with them fstab and systemd's mount units, run under the
//! names `mount.TYPE` and `umount.TYPE` for file systems that they cannot mount themselves. Arguments and exit codes are
//! those of mount(8), "External helpers" and "Exit status"; what is meant is then said to our own command line.
//!
//! The type is `registryfs` in a command or in fstab, and `fuse.registryfs` in the mount table, from where umount(8)
//! takes it, as systemd calls it (`umount -c`). Called plainly it asks statfs(2), which says `fuse` of a mount that answers,
//! and then takes no helper of ours.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use nix::sched::{CloneFlags, setns};

use super::mount_options::MountOptions;
use super::{Cli, output};
use crate::error::{Error, Result};

/// The names of the type.
const TYPES: [&str; 2] = ["registryfs", "fuse.registryfs"];

/// Options of mount(8) and systemd that say when and by whom something is mounted, or what is so with every mount of
/// ours anyway: read-only, without set-user-ID, device files and access times. mount(8) adds `rw` unasked.
const WITHOUT_MEANING: [&str; 39] = [
    "_netdev",
    "async",
    "atime",
    "auto",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "group",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "nofail",
    "nogroup",
    "noiversion",
    "nolazytime",
    "nomand",
    "noowner",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nouser",
    "nousers",
    "owner",
    "relatime",
    "ro",
    "rw",
    "silent",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "user",
    "users",
];
/// Beginnings of such options that carry a text for somebody else.
const FOR_OTHERS: [&str; 6] = ["x-", "X-", "comment=", "user=", "helper=", "uhelper="];

/// What this program was started as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Helper {
    /// `mount.TYPE`.
    Mount,
    /// `umount.TYPE`.
    Umount,
}

impl Helper {
    /// By the name that the program was called by.
    pub(super) fn named(program: &OsStr) -> Option<Self> {
        let name = Path::new(program).file_name()?.to_str()?;
        let (helper, fs_type) = match name.split_once('.')? {
            ("mount", fs_type) => (Self::Mount, fs_type),
            ("umount", fs_type) => (Self::Umount, fs_type),
            _ => return None,
        };
        TYPES.contains(&fs_type).then_some(helper)
    }

    /// Does what mount(8) or umount(8) asks with this command line, and exits as they expect.
    pub(super) fn main(self, arguments: Vec<OsString>) -> ExitCode {
        let understood = match self {
            Self::Mount => MountArguments::try_parse_from(arguments).map(Arguments::Mount),
            Self::Umount => UmountArguments::try_parse_from(arguments).map(Arguments::Umount),
        };
        match understood {
            Ok(arguments) => arguments.run().map_or_else(
                |error| {
                    output::note(&error.to_string());
                    ExitCode::from(exit_status(&error))
                },
                |()| ExitCode::SUCCESS,
            ),
            Err(error) => {
                // Where neither stream can be written there is no one to tell.
                let _ = error.print();
                ExitCode::from(u8::from(error.use_stderr()))
            }
        }
    }
}

/// mount(8), "Exit status".
fn exit_status(error: &Error) -> u8 {
    const USAGE_OR_PERMISSIONS: u8 = 1;
    const SYSTEM: u8 = 2;
    const INTERRUPTED: u8 = 8;
    const FAILURE: u8 = 32;
    match error {
        Error::Usage { .. } => USAGE_OR_PERMISSIONS,
        Error::Interrupted => INTERRUPTED,
        Error::Io { errno, .. } => match *errno {
            libc::EPERM | libc::EACCES => USAGE_OR_PERMISSIONS,
            libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN => SYSTEM,
            _ => FAILURE,
        },
        _ => FAILURE,
    }
}

/// `mount.TYPE SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`.
#[derive(Debug, Parser)]
#[command(
    name = "mount.registryfs",
    version,
    about = "For mount(8), which runs this for the type registryfs"
)]
struct MountArguments {
    /// What to mount, as for `registryfs mount`
    source: OsString,
    /// Where
    mountpoint: PathBuf,
    /// Ignore options that are not known
    #[arg(short = 's')]
    sloppy: bool,
    /// Check everything, but do not mount
    #[arg(short = 'f')]
    fake: bool,
    #[command(flatten)]
    common: CommonArguments,
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS", allow_hyphen_values = true)]
    options: Vec<String>,
}

/// `umount.TYPE MOUNTPOINT [-flnrv] [-N NAMESPACE] [-t TYPE]`.
#[derive(Debug, Parser)]
#[command(
    name = "umount.registryfs",
    version,
    about = "For umount(8), which runs this for the type registryfs"
)]
struct UmountArguments {
    /// Where
    mountpoint: PathBuf,
    /// Let every use of it fail from now on
    #[arg(short = 'f')]
    force: bool,
    /// Take it out of the tree; who uses it goes on
    #[arg(short = 'l')]
    lazy: bool,
    /// Accepted: it is read-only
    #[arg(short = 'r')]
    read_only: bool,
    #[command(flatten)]
    common: CommonArguments,
}

#[derive(Debug, clap::Args)]
struct CommonArguments {
    /// Accepted: there is no /etc/mtab
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Log what is done
    #[arg(short = 'v')]
    verbose: bool,
    /// Do it in the mount namespace of this process or file
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<PathBuf>,
    /// The type
    #[arg(short = 't', value_name = "TYPE", value_parser = TYPES)]
    fs_type: Option<String>,
}

#[derive(Debug)]
enum Arguments {
    Mount(MountArguments),
    Umount(UmountArguments),
}

impl Arguments {
    fn run(self) -> Result<()> {
        let (common, meant) = match &self {
            Self::Mount(mount) => (&mount.common, mount.meant()?),
            Self::Umount(umount) => (&umount.common, umount.meant()?),
        };
        if let Some(namespace) = &common.namespace {
            enter(namespace)?;
        }
        let verbose = common.verbose.then(|| OsString::from("--verbose"));
        let line = [OsString::from("registryfs")]
            .into_iter()
            .chain(verbose)
            .chain(meant);
        let cli = Cli::try_parse_from(line).map_err(|error| Error::usage(error.to_string()))?;
        match &self {
            Self::Mount(MountArguments { fake: true, .. }) => Ok(()),
            _ => cli.run(),
        }
    }
}

impl MountArguments {
    /// The same in the words of `registryfs mount`.
    fn meant(&self) -> Result<Vec<OsString>> {
        let mut line = vec![OsString::from("mount")];
        for option in self.options.iter().flat_map(|text| split(text)) {
            if WITHOUT_MEANING.contains(&option.as_str())
                || FOR_OTHERS.iter().any(|start| option.starts_with(start))
            {
                continue;
            }
            match MountOptions::parse(std::slice::from_ref(&option)) {
                Ok(_) => line.push(format!("-o{option}").into()),
                Err(_) if self.sloppy => {}
                Err(error) => return Err(error),
            }
        }
        line.push("--".into());
        line.push(self.source.clone());
        line.push(absolute(&self.mountpoint)?);
        Ok(line)
    }
}

impl UmountArguments {
    /// The same in the words of `registryfs umount`.
    fn meant(&self) -> Result<Vec<OsString>> {
        let how = match self {
            Self { force: true, .. } => Some("--force"),
            Self { lazy: true, .. } => Some("--lazy"),
            _ => None,
        };
        let mut line = vec![OsString::from("umount")];
        line.extend(how.map(OsString::from));
        line.push(absolute(&self.mountpoint)?);
        Ok(line)
    }
}

/// A mountpoint that no command line takes for an option.
fn absolute(mountpoint: &Path) -> Result<OsString> {
    std::path::absolute(mountpoint)
        .map(PathBuf::into_os_string)
        .map_err(|error| Error::io(format!("the mountpoint {}", mountpoint.display()), &error))
}

/// The options of one `-o`: separated by commas, but for those between double quotes (mount(8), "Filesystem-independent
/// mount options"). None is empty.
fn split(text: &str) -> Vec<String> {
    let mut is_quoted = false;
    let at_separator = |c: char| {
        is_quoted ^= c == '"';
        c == ',' && !is_quoted
    };
    text.split(at_separator)
        .filter(|option| !option.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Moves this process, which has no other thread yet, into another mount namespace: of the process with that number, or
/// the one that a file stands for.
fn enter(namespace: &Path) -> Result<()> {
    let is_number = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    let path = match namespace.to_str().filter(|name| is_number(name)) {
        Some(pid) => PathBuf::from(format!("/proc/{pid}/ns/mnt")),
        None => namespace.to_owned(),
    };
    let failed = |error: &std::io::Error| Error::io(format!("the mount namespace {}", path.display()), error);
    let file = std::fs::File::open(&path).map_err(|error| failed(&error))?;
    setns(file, CloneFlags::CLONE_NEWNS).map_err(|errno| failed(&errno.into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn meant(arguments: &[&str]) -> Result<Vec<String>> {
        let line = ["mount.registryfs", "none", "/m"].iter().chain(arguments);
        let meant = MountArguments::try_parse_from(line).unwrap().meant()?;
        Ok(meant
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect())
    }

    #[test]
    fn the_program_is_a_helper_by_its_name_alone() {
        for (name, helper) in [
            ("mount.registryfs", Some(Helper::Mount)),
            ("/sbin/mount.fuse.registryfs", Some(Helper::Mount)),
            ("umount.registryfs", Some(Helper::Umount)),
            ("/sbin/umount.fuse.registryfs", Some(Helper::Umount)),
            ("registryfs", None),
            ("mount", None),
            ("/mount.registryfs/registryfs", None),
            ("mount.fuse", None),
            ("remount.registryfs", None),
        ] {
            assert_eq!(Helper::named(OsStr::new(name)), helper, "{name}");
        }
    }

    #[test]
    fn what_mount_and_systemd_add_is_left_out_and_the_rest_is_kept() {
        let from_fstab =
            "rw,_netdev,nofail,x-systemd.automount,x-systemd.requires=a.service,comment=a b,nodev,user=me";
        assert_eq!(
            meant(&["-n", "-o", from_fstab]).unwrap(),
            ["mount", "--", "none", "/m"]
        );
        let own = meant(&[
            "-v",
            "-t",
            "fuse.registryfs",
            "-o",
            "rw,allow=a.b,X-mount.mkdir,tag_ttl=5",
            "-o",
            "offline",
        ]);
        assert_eq!(
            own.unwrap(),
            [
                "mount",
                "-oallow=a.b",
                "-otag_ttl=5",
                "-ooffline",
                "--",
                "none",
                "/m"
            ]
        );
        assert_eq!(
            meant(&["-o", "x-a=\"b,colour\",ro"]).unwrap(),
            ["mount", "--", "none", "/m"],
            "a comma in quotes does not separate"
        );
    }

    #[test]
    fn what_is_not_known_is_refused_by_name_unless_sloppy() {
        let refused = meant(&["-o", "ro,colour=red"]).unwrap_err();
        assert!(refused.to_string().contains("colour") && !refused.to_string().contains("red"));
        assert_eq!(exit_status(&refused), 1);
        assert_eq!(
            meant(&["-s", "-o", "colour=red"]).unwrap(),
            ["mount", "--", "none", "/m"]
        );
        assert!(meant(&["-o", "remount"]).is_err(), "it would change nothing");
    }

    #[test]
    fn exit_codes_are_those_of_mount() {
        let io = |errno| Error::io("mount", &std::io::Error::from_raw_os_error(errno));
        for (error, status) in [
            (Error::usage("no such directory"), 1),
            (io(libc::EPERM), 1),
            (io(libc::ENOMEM), 2),
            (Error::Interrupted, 8),
            (io(libc::EBUSY), 32),
            (Error::network("a.b", "refused"), 32),
            (Error::not_found("a.b/c", "no such tag"), 32),
        ] {
            assert_eq!(exit_status(&error), status, "{error}");
        }
    }

    proptest! {
        #[test]
        fn options_are_separated_outside_of_quotes(options in proptest::collection::vec("[a-z=]{1,5}(\"[a-z,]{0,5}\")?", 0..6)) {
            prop_assert_eq!(split(&options.join(",")), options);
        }

        #[test]
        fn any_text_of_options_is_taken_apart_without_loss(text in "[a\",]{0,12}") {
            let parts = split(&text);
            prop_assert!(parts.iter().all(|part| !part.is_empty()));
            let letters = |text: &str| text.replace(',', "").len();
            prop_assert_eq!(parts.iter().map(|part| letters(part)).sum::<usize>(), letters(&text));
        }
    }
}
