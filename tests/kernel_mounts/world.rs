//! What the tests share: a store, a connection that shows devices, and trees on it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::future::Future;
use std::io::Cursor;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use registryfs::digest::Digest;
use registryfs::error::Result;
use registryfs::fetch::{FetchOptions, Fetcher};
use registryfs::fs::devices::{Devices, Probe, Shown};
use registryfs::fuse::{Attachment, Detach, DetachedMount, ErofsDevice, Helper, NewErofs, Place};
use registryfs::image::erofs::{probe, write};
use registryfs::image::tree::{Tree, Whiteouts, merge};
use registryfs::layer::Format;
use registryfs::layer::entry::{Entry, Kind};
use registryfs::layer::index::{Coding, Index, Summary};
use registryfs::layer::index_builder::{IndexBuilder, NewChunk};
use registryfs::registry::{Client, ClientOptions};
use registryfs::store::Store;
use tokio::runtime::Runtime;

/// What hangs longer than this hangs for ever.
const LIMIT: Duration = Duration::from_secs(45);
/// How soon things happen that need nothing but this machine, which may be busy.
pub(crate) const PROMPTLY: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) helper: Helper,
    pub(crate) devices: Devices,
    pub(crate) connection: DetachedMount,
    runtime: Runtime,
    dir: Unmounted,
    _store: tempfile::TempDir,
}

/// A directory below which nothing stays mounted.
struct Unmounted(tempfile::TempDir);

impl Drop for Unmounted {
    fn drop(&mut self) {
        while let Some(mountpoint) = below(self.0.path()) {
            if nix::mount::umount2(&mountpoint, nix::mount::MntFlags::MNT_DETACH).is_err() {
                return;
            }
        }
    }
}

fn below(dir: &Path) -> Option<PathBuf> {
    let table = fs::read(format!("/proc/{}/mountinfo", std::process::id())).unwrap();
    let table = String::from_utf8_lossy(&table).into_owned();
    let mut places = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
    places.rfind(|place| place.starts_with(dir))
}

/// A superblock with one file of two blocks on a device that fails until it is healed.
pub(crate) struct MadeTree {
    pub(crate) mount: OwnedFd,
    pub(crate) device: Probe,
    pub(crate) attachment: Option<Attachment>,
}

impl World {
    pub(crate) fn new() -> Self {
        let store_dir = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let store = Store::open(store_dir.path()).unwrap();
        let client = Client::new(ClientOptions::default()).unwrap();
        let handle = runtime.handle().clone();
        let fetcher = Fetcher::new(client, store, handle, FetchOptions::default());
        let devices = Devices::new(fetcher, 10);
        let helper = Helper::at(env!("CARGO_BIN_EXE_registryfs"));
        let tree = Arc::new(devices.clone());
        let connection = DetachedMount::start(tree, &helper, 128, runtime.handle()).unwrap();
        let dir = tempfile::tempdir_in(fs::canonicalize(std::env::temp_dir()).unwrap()).unwrap();
        Self {
            helper,
            devices,
            connection,
            runtime,
            dir: Unmounted(dir),
            _store: store_dir,
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.0.path()
    }

    pub(crate) fn handle(&self) -> &tokio::runtime::Handle {
        self.runtime.handle()
    }

    pub(crate) fn new_dir(&self, name: &str) -> PathBuf {
        self.new_dir_os(OsStr::new(name))
    }

    pub(crate) fn new_dir_os(&self, name: &OsStr) -> PathBuf {
        let dir = self.dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// A file without a name.
    pub(crate) fn file(&self, bytes: &[u8]) -> File {
        let path = self.dir().join("file");
        fs::write(&path, bytes).unwrap();
        let file = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        file
    }

    /// An image with one file, on its only device.
    pub(crate) fn image(&self) -> File {
        self.file(&probe::image().unwrap())
    }

    fn new_erofs<'a>(&'a self, image: &'a File, devices: Vec<ErofsDevice<'a>>, source: &str) -> NewErofs<'a> {
        NewErofs {
            image: image.as_fd(),
            devices,
            shown_root: self.connection.root(),
            source: source.to_owned(),
            no_exec: false,
        }
    }

    pub(crate) fn make_of<'a>(
        &'a self,
        image: &'a File,
        devices: Vec<ErofsDevice<'a>>,
        source: &str,
    ) -> Result<OwnedFd> {
        self.helper.make_erofs(&self.new_erofs(image, devices, source))
    }

    pub(crate) fn make(&self, source: &str) -> MadeTree {
        let device = self.devices.show_probe();
        let shown = vec![ErofsDevice::Shown(device.shown().name().to_owned())];
        let mount = self.make_of(&self.image(), shown, source).unwrap();
        MadeTree {
            mount,
            device,
            attachment: None,
        }
    }

    pub(crate) fn make_at(&self, source: &str, place: &Path) -> MadeTree {
        let device = self.devices.show_probe();
        let shown = vec![ErofsDevice::Shown(device.shown().name().to_owned())];
        let image = self.image();
        let new = self.new_erofs(&image, shown, source);
        let (mount, attachment) = self.helper.make_and_attach_erofs(&new, &at(place)).unwrap();
        drop(new);
        MadeTree {
            mount,
            device,
            attachment: Some(attachment),
        }
    }

    pub(crate) fn attach(&self, tree: &MadeTree, place: &Path) -> Result<Attachment> {
        self.attach_mount(tree.mount.as_fd(), place)
    }

    pub(crate) fn attach_mount(&self, mount: BorrowedFd<'_>, place: &Path) -> Result<Attachment> {
        self.helper.attach_erofs(mount, &at(place))
    }

    pub(crate) fn detach(&self, attachment: &Attachment, how: Detach) -> Result<()> {
        let mut results = self
            .helper
            .detach_erofs(std::slice::from_ref(attachment), how)
            .unwrap();
        results.pop().unwrap()
    }

    /// Waits for what must come.
    pub(crate) fn wait_for(&self, future: impl Future<Output = ()>) {
        let in_time = async { tokio::time::timeout(LIMIT, future).await };
        self.runtime.block_on(in_time).unwrap();
    }
}

fn at(place: &Path) -> Place<'_> {
    Place {
        mountpoint: place,
        guarded: None,
        deadline: Duration::from_secs(20),
    }
}

/// Whether nobody has the file open any more.
pub(crate) fn is_over(shown: &Shown) -> bool {
    let closed = std::pin::pin!(shown.closed());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    closed.poll(&mut context).is_ready()
}

/// The line of the mount table for the last mount at a place, in its fields.
pub(crate) fn attached_tree(place: &Path) -> Option<Vec<String>> {
    let table = fs::read(format!("/proc/{}/mountinfo", std::process::id())).unwrap();
    let table = String::from_utf8_lossy(&table).into_owned();
    let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let place = place.to_string_lossy().into_owned();
    table.lines().map(fields).rfind(|fields| fields[4] == place)
}

/// The source of what is mounted at a place, as the table spells it.
pub(crate) fn source_of(place: &Path) -> String {
    let fields = attached_tree(place).unwrap();
    let dash = fields.iter().position(|field| field == "-").unwrap();
    assert_eq!(fields[dash + 1], "erofs");
    fields[dash + 2].clone()
}

/// Runs what may hang on a thread of its own.
pub(crate) fn within<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(LIMIT).unwrap()
}

/// An image of many layers with one small file each, and their data files.
pub(crate) struct ManyLayers {
    pub(crate) image: Vec<u8>,
    pub(crate) contents: Vec<Vec<u8>>,
}

pub(crate) fn many_layers(count: usize) -> ManyLayers {
    let mut contents = Vec::new();
    let mut indexes = Vec::new();
    for number in 0..count {
        let bytes = format!("content of {number}\n").into_bytes();
        let mut builder = IndexBuilder::new(Coding::Stored);
        let mut file = Entry::new(format!("file-{number}"), Kind::File);
        file.size = bytes.len() as u64;
        builder.entry(&file).unwrap();
        let chunk = NewChunk {
            bytes: file.size,
            blob_offset: 0,
            inner_offset: 0,
            digest: Some(Digest::of(&bytes)),
        };
        builder.chunk(chunk).unwrap();
        let index = builder
            .finish(Summary::of(Format::Tar, 4096), 4096)
            .unwrap()
            .to_vec();
        indexes.push(Index::open(index).unwrap());
        let mut block = bytes;
        block.resize(4096, 0);
        contents.push(block);
    }
    let indexes: Vec<_> = indexes.iter().collect();
    let key = Digest::of(b"many layers");
    let merged = merge(&indexes, &key, Whiteouts::Apply).unwrap();
    let tree = Tree::open(merged.bytes, &key).unwrap();
    let mut image = Cursor::new(Vec::new());
    write(&tree, &indexes, &key, &mut image).unwrap();
    ManyLayers {
        image: image.into_inner(),
        contents,
    }
}
