//! The made-up file trees of the demo's images: a small Linux root with everything that a file tree can have, language
//! runtimes with files of many chunks, and applications that change what lies below them.

use crate::layer::entry::{Entry, Kind, Time};

use super::seeded::Seeded;

/// When the trees were made: 2023-11-14, and a day later for each number of a version.
const MADE_AT_S: i64 = 1_700_000_000;
const DAY_S: i64 = 86_400;
/// `security.capability` for `cap_net_raw+ep`: revision 2 with the effective flag, permitted bit 13 (capability.h).
const CAP_NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const WORDS: [&str; 24] = [
    "the",
    "service",
    "reads",
    "its",
    "configuration",
    "when",
    "it",
    "starts",
    "and",
    "writes",
    "a",
    "line",
    "for",
    "each",
    "request",
    "that",
    "takes",
    "longer",
    "than",
    "usual",
    "unless",
    "told",
    "otherwise",
    "quietly",
];
const PROGRAMS: [&str; 14] = [
    "cat", "chmod", "cp", "date", "env", "find", "grep", "ls", "mkdir", "mv", "perl", "sed", "sh", "tar",
];
const PACKAGES: [&str; 6] = [
    "base-files",
    "coreutils",
    "grep",
    "openssh-server",
    "perl",
    "zlib",
];

/// A layer in the making.
#[derive(Debug)]
struct Tree {
    entries: Vec<(Entry, Vec<u8>)>,
    mtime: Time,
}

impl Tree {
    fn new(age_days: i64) -> Self {
        Self {
            entries: Vec::new(),
            mtime: Time {
                seconds: MADE_AT_S + age_days * DAY_S,
                nanos: 0,
            },
        }
    }

    fn add(&mut self, path: &str, kind: Kind, mode: u32, payload: Vec<u8>) -> &mut Entry {
        let entry = Entry {
            mode,
            mtime: self.mtime,
            size: payload.len() as u64,
            ..Entry::new(path, kind)
        };
        self.entries.push((entry, payload));
        let last = self.entries.len() - 1;
        &mut self.entries[last].0
    }

    fn dir(&mut self, path: &str, mode: u32) -> &mut Entry {
        self.add(&format!("{path}/"), Kind::Dir, mode, Vec::new())
    }

    fn file(&mut self, path: &str, mode: u32, payload: impl Into<Vec<u8>>) -> &mut Entry {
        self.add(path, Kind::File, mode, payload.into())
    }

    fn link(&mut self, path: &str, kind: Kind, target: &str) {
        let mode = if kind == Kind::Symlink { 0o777 } else { 0o755 };
        self.add(path, kind, mode, Vec::new()).link = target.into();
    }

    fn device(&mut self, path: &str, kind: Kind, mode: u32, rdev: (u32, u32)) {
        self.add(path, kind, mode, Vec::new()).rdev = rdev;
    }

    /// Hides what lower layers have at `DIRECTORY/NAME`.
    fn whiteout(&mut self, directory: &str, name: &str) {
        self.file(&format!("{directory}/.wh.{name}"), 0o644, "");
    }

    fn owned(entry: &mut Entry, uid: u32, gid: u32) {
        (entry.uid, entry.gid) = (uid, gid);
    }
}

/// Lines of plausible English, `bytes` of them or a little more.
fn prose(seeded: &mut Seeded, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 80);
    let mut line_bytes = 0;
    while text.len() < bytes {
        let word = seeded.pick(&WORDS);
        text.push_str(word);
        line_bytes += word.len() + 1;
        text.push(if line_bytes > 72 { '\n' } else { ' ' });
        line_bytes = if line_bytes > 72 { 0 } else { line_bytes };
    }
    text.push('\n');
    text
}

/// Something that `file` takes for a program: an ELF header, then half code that does not compress, half text.
fn program(name: &str, architecture: &str, bytes: usize) -> Vec<u8> {
    let mut seeded = Seeded::from_text(&format!("{name} {architecture}"));
    // e_machine of x86-64 and AArch64 (elf.h).
    let machine = if architecture == "arm64" { 183 } else { 62 };
    let mut elf = vec![
        0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, machine, 0, 1, 0, 0, 0,
    ];
    elf.extend_from_slice(&seeded.bytes(bytes / 2));
    elf.extend_from_slice(prose(&mut seeded, bytes / 2).as_bytes());
    elf
}

/// The root file system of `release` (11 or 12) for one architecture.
pub(super) fn base(release: u32, architecture: &str) -> Vec<(Entry, Vec<u8>)> {
    let mut tree = Tree::new(i64::from(release));
    for (path, mode) in [
        (".", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("etc/ssh", 0o755),
        ("home", 0o755),
        ("root", 0o700),
        ("run", 0o755),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("usr/lib", 0o755),
        ("usr/share", 0o755),
        ("usr/share/dict", 0o755),
        ("usr/share/doc", 0o755),
        ("var", 0o755),
        ("var/log", 0o755),
    ] {
        tree.dir(path, mode);
    }
    Tree::owned(tree.dir("var/mail", 0o2775), 0, 8);
    Tree::owned(tree.dir("home/app", 0o750), 1000, 1000);
    for (path, target) in [("bin", "usr/bin"), ("lib", "usr/lib"), ("var/run", "/run")] {
        tree.link(path, Kind::Symlink, target);
    }
    configuration(&mut tree, release, architecture);
    programs(&mut tree, architecture);
    for package in PACKAGES {
        let directory = format!("usr/share/doc/{package}");
        let mut seeded = Seeded::from_text(package);
        tree.dir(&directory, 0o755);
        tree.file(&format!("{directory}/copyright"), 0o644, prose(&mut seeded, 1500));
        let changes = format!(
            "{package} ({release}.1) stable; urgency=low\n\n  * {}",
            prose(&mut seeded, 600)
        );
        tree.file(&format!("{directory}/changelog"), 0o644, changes);
    }
    let words = prose(&mut Seeded::from_text("words"), 300_000);
    tree.file("usr/share/dict/words", 0o644, words);
    tree.device("dev/null", Kind::Char, 0o666, (1, 3));
    tree.device("dev/loop0", Kind::Block, 0o660, (7, 0));
    tree.add("run/initctl", Kind::Fifo, 0o600, Vec::new());
    tree.entries
}

fn configuration(tree: &mut Tree, release: u32, architecture: &str) {
    let os_release = format!(
        "PRETTY_NAME=\"Demo Linux {release}\"\nNAME=\"Demo Linux\"\nVERSION_ID=\"{release}\"\nID=demo\nHOME_URL=\"https://demo.example/\"\n"
    );
    tree.file("usr/lib/os-release", 0o644, os_release);
    tree.link("etc/os-release", Kind::Symlink, "../usr/lib/os-release");
    tree.file("etc/hostname", 0o644, "demo\n");
    tree.file(
        "etc/motd",
        0o644,
        format!("Demo Linux {release} on {architecture}\n"),
    );
    let users = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n";
    tree.file("etc/passwd", 0o644, users);
    Tree::owned(
        tree.file("etc/shadow", 0o640, "root:*:19675:0:99999:7:::\n"),
        0,
        42,
    );
    let root_login = if release < 12 { "yes" } else { "prohibit-password" };
    let sshd = format!(
        "# The server's configuration; see sshd_config(5).\nPort 22\nPermitRootLogin {root_login}\nPasswordAuthentication no\nX11Forwarding no\nSubsystem sftp /usr/lib/openssh/sftp-server\n"
    );
    tree.file("etc/ssh/sshd_config", 0o644, sshd);
    tree.file("etc/empty", 0o644, "");
    let noted = tree.file("etc/noted", 0o644, "This file has an extended attribute.\n");
    noted.xattrs = vec![(b"user.note".to_vec(), b"made up".to_vec())];
}

fn programs(tree: &mut Tree, architecture: &str) {
    for name in PROGRAMS {
        let bytes = program(name, architecture, 12_000);
        tree.file(&format!("usr/bin/{name}"), 0o755, bytes);
    }
    tree.link("usr/bin/perl5.36.0", Kind::Hardlink, "usr/bin/perl");
    tree.link("usr/bin/egrep", Kind::Symlink, "grep");
    tree.file("usr/bin/su", 0o4755, program("su", architecture, 9000));
    Tree::owned(
        tree.file("usr/bin/wall", 0o2755, program("wall", architecture, 5000)),
        0,
        5,
    );
    let ping = tree.file("usr/bin/ping", 0o755, program("ping", architecture, 8000));
    ping.xattrs = vec![(b"security.capability".to_vec(), CAP_NET_RAW.to_vec())];
}

/// The runtime of a made-up language: a library of many chunks, and many small modules.
pub(super) fn runtime(language: &str, architecture: &str) -> Vec<(Entry, Vec<u8>)> {
    let mut tree = Tree::new(20);
    let directory = format!("usr/lib/{language}");
    tree.dir(&directory, 0o755);
    let library = program(&format!("lib{language}"), architecture, 900_000);
    tree.file(&format!("{directory}/lib{language}.so.1.0"), 0o644, library);
    tree.link(
        &format!("{directory}/lib{language}.so.1"),
        Kind::Symlink,
        &format!("lib{language}.so.1.0"),
    );
    tree.file(
        &format!("usr/bin/{language}"),
        0o755,
        program(language, architecture, 30_000),
    );
    for module in WORDS {
        let text = prose(&mut Seeded::from_text(&format!("{language} {module}")), 900);
        tree.file(&format!("{directory}/{module}.txt"), 0o644, text);
    }
    tree.entries
}

/// Version `number` (from 0) of the application of a repository, named `version`: from the second version on it hides
/// the message of the day, and the third replaces its plugins by others.
pub(super) fn application(repository: &str, number: u32, version: &str) -> Vec<(Entry, Vec<u8>)> {
    let mut tree = Tree::new(30 + i64::from(number));
    let mut seeded = Seeded::from_text(repository);
    tree.dir("opt", 0o755);
    tree.dir("opt/app", 0o755);
    tree.file("opt/app/VERSION", 0o644, format!("{version}\n"));
    let port = 8000 + seeded.below(1000);
    let workers = 2 + number;
    let settings = format!(
        "name = \"{repository}\"\nversion = \"{version}\"\nport = {port}\nworkers = {workers}\nlog_level = \"info\"\n"
    );
    Tree::owned(tree.file("opt/app/settings.toml", 0o640, settings), 1000, 1000);
    tree.file("opt/app/README", 0o644, prose(&mut seeded, 2000));
    let start = format!("#!/bin/sh\nexec /opt/app/serve --port {port} \"$@\"\n");
    tree.file("opt/app/start", 0o755, start);
    tree.link("usr/bin/start", Kind::Symlink, "/opt/app/start");
    let serve = program(&format!("{repository} {version}"), "any", 6000);
    tree.file("opt/app/serve", 0o755, serve);
    if number >= 1 {
        tree.whiteout("etc", "motd");
    }
    tree.entries
}

/// The plugins of an application, in a layer of their own below it.
pub(super) fn plugins(repository: &str, replaced: bool) -> Vec<(Entry, Vec<u8>)> {
    let mut tree = Tree::new(25);
    let names: &[&str] = if replaced {
        &["export"]
    } else {
        &["audit", "import"]
    };
    tree.dir("opt", 0o755);
    tree.dir("opt/app", 0o755);
    tree.dir("opt/app/plugins", 0o755);
    if replaced {
        tree.whiteout("opt/app/plugins", ".wh..opq");
    }
    for name in names {
        let mut seeded = Seeded::from_text(&format!("{repository} {name}"));
        tree.file(
            &format!("opt/app/plugins/{name}.txt"),
            0o644,
            prose(&mut seeded, 3000),
        );
    }
    tree.entries
}
