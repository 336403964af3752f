//! What an image's directory holds: the registry's own bytes, exact metadata, attributes, and nothing that can be written.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use registryfs::demo::{Content, Fault, Image, ImageBuilder, Layer, Scope};
use registryfs::digest::Digest;
use registryfs::layer::entry::{Entry, Kind};
use registryfs::layer::estargz::TOC_DIGEST_ANNOTATION;
use rustix::fs::{getxattr, listxattr};

use crate::support::{File, dir, file, image, layer};
use crate::world::{World, errno, names, noise, until};

fn content_of(image: &Image) -> Content {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", image);
    content
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn an_image_shows_the_bytes_that_the_registry_has() {
    let made = image(&[&[file("a", noise(200_000, 1))], &[file("b", "b")]]);
    let world = World::new(content_of(&made)).mounted();
    let at = world.at("team/app/1.0");
    let manifest = fs::read(at.join("manifest.json")).unwrap();
    assert_eq!(manifest, made.manifest);
    assert_eq!(read(&at.join("digest")), format!("{}\n", Digest::of(&manifest)));
    assert_eq!(fs::read(at.join("config.json")).unwrap(), made.config);
    assert_eq!(names(&at.join("layers")), ["0", "1"]);
    for (number, layer) in made.layers.iter().enumerate() {
        let at = at.join("layers").join(number.to_string());
        assert_eq!(
            names(&at),
            ["blob", "digest", "format", "fs", "media_type", "size", "toc.json"]
        );
        assert_eq!(fs::read(at.join("blob")).unwrap(), *layer.blob());
        assert_eq!(read(&at.join("digest")), format!("{}\n", layer.digest()));
        assert_eq!(read(&at.join("size")), format!("{}\n", layer.blob().len()));
        assert!(read(&at.join("format")).starts_with("estargz\n"));
        assert_eq!(
            read(&at.join("media_type")),
            "application/vnd.oci.image.layer.v1.tar+gzip\n"
        );
        let toc = fs::read(at.join("toc.json")).unwrap();
        assert_eq!(
            Digest::of(&toc).to_string(),
            layer.annotations[TOC_DIGEST_ANNOTATION]
        );
        for own in names(&at) {
            let path = at.join(&own);
            if path.is_file() {
                assert_eq!(
                    fs::metadata(&path).unwrap().len(),
                    fs::read(&path).unwrap().len() as u64,
                    "{own}"
                );
            }
        }
    }
    assert_eq!(errno(fs::metadata(at.join("layers/2"))), libc::ENOENT);
    assert_eq!(errno(fs::metadata(at.join("layers/01"))), libc::ENOENT);
    assert_eq!(errno(fs::metadata(at.join("index.json"))), libc::ENOENT);
}

#[test]
fn a_blob_can_be_read_by_range() {
    let made = image(&[&[file("a", noise(3_000_000, 1))]]);
    let world = World::new(content_of(&made)).mounted();
    let blob = fs::File::open(world.at("team/app/1.0/layers/0/blob")).unwrap();
    let expected = made.layers[0].blob();
    for start in [expected.len() - 1000, 0, 1_500_001, 4096] {
        let mut bytes = vec![0; 1000];
        blob.read_exact_at(&mut bytes, start as u64).unwrap();
        assert_eq!(bytes, expected[start..start + 1000], "{start}");
    }
}

#[test]
fn a_lying_blob_never_reads_to_its_end() {
    // The larger one is longer than the kernel's reads may be out of order.
    for size in [3_000_000, 9_000_000] {
        let made = image(&[&[file("a", noise(size, 1))]]);
        let world = World::new(content_of(&made)).mounted();
        let layer = &made.layers[0];
        let blob = world.at("team/app/1.0/layers/0/blob");
        fs::metadata(&blob).unwrap();
        let lie = Fault::FlipByte(100);
        world.handle().inject(Scope::containing("/blobs/"), lie);
        assert_eq!(errno(fs::read(&blob)), libc::EIO);
        let mut lie = layer.blob().to_vec();
        lie[100] ^= 0xff;
        let errors = world.errors();
        assert!(errors.contains(&layer.digest().to_string()), "{errors}");
        assert!(errors.contains(&Digest::of(&lie).to_string()), "{errors}");
        // The kernel has had most of it: neither it nor a registry that is right by now makes the lie pass.
        assert_eq!(errno(fs::read(&blob)), libc::EIO, "a second reader is warned too");
        world.handle().clear_faults();
        until("the blob is right again", || {
            std::thread::sleep(Duration::from_millis(500));
            fs::read(&blob).is_ok_and(|bytes| {
                assert!(bytes == *layer.blob(), "the lie passes");
                true
            })
        });
    }
}

#[test]
fn a_lie_in_what_an_earlier_reader_got_is_found() {
    let size = 9_000_000;
    let made = image(&[&[file("a", noise(size, 1))]]);
    let world = World::new(content_of(&made)).mounted();
    let path = world.at("team/app/1.0/layers/0/blob");
    let blob = fs::File::open(&path).unwrap();
    // The middle is a lie, and stays in the page cache.
    world
        .handle()
        .inject(Scope::containing("/blobs/"), Fault::FlipByte(500_000));
    let mut middle = vec![0; 2_000_000];
    blob.read_exact_at(&mut middle, 6_000_000).unwrap();
    assert!(middle != made.layers[0].blob()[6_000_000..8_000_000]);
    world.handle().clear_faults();
    match fs::read(&path) {
        Ok(bytes) => assert!(bytes == *made.layers[0].blob(), "the lie passes"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO)),
    }
}

#[test]
fn the_two_ends_of_a_blob_cost_no_more_than_themselves() {
    let made = image(&[&[file("a", noise(10_000_000, 1))]]);
    let world = World::new(content_of(&made)).mounted();
    let blob = fs::File::open(world.at("team/app/1.0/layers/0/blob")).unwrap();
    let size = made.layers[0].blob().len() as u64;
    let ((), requests) = world.requests(|| {
        for at in [0, size - 1000] {
            blob.read_exact_at(&mut [0; 1000], at).unwrap();
        }
    });
    assert!(requests.len() <= 2, "{requests:#?}");
}

fn with_xattrs(mut file: File, xattrs: &[(&str, &[u8])]) -> File {
    let xattrs = xattrs
        .iter()
        .map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()));
    file.0.xattrs = xattrs.collect();
    file
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    let length = getxattr(path, name, &mut buffer).ok()?;
    buffer.truncate(length);
    Some(buffer)
}

fn xattr_names(path: &Path) -> Vec<String> {
    let mut buffer = vec![0; 4096];
    let length = listxattr(path, &mut buffer).unwrap();
    let names = buffer[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let mut names: Vec<String> = names
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect();
    names.sort();
    names
}

/// A `security.capability` of revision 2 with cap_net_raw permitted and effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn xattrs_are_the_image_s_and_ours_are_hidden() {
    let given: &[(&str, &[u8])] = &[
        ("user.note", b"hello\0world"),
        ("user.empty", b""),
        ("security.capability", &CAPABILITY),
        ("security.selinux", b"system_u:object_r:bin_t:s0"),
        ("trusted.overlay.opaque", b"y"),
        ("user.overlay.opaque", b"y"),
    ];
    let lower = [
        file("plain", noise(9000, 1)),
        with_xattrs(dir("d/"), &[("user.dir", b"1")]),
    ];
    let made = image(&[&lower, &[with_xattrs(file("ping", "ping"), given)]]);
    // The image's own are the same whoever serves them.
    let kernel = World::new(content_of(&made)).mounted();
    let ping = kernel.at("team/app/1.0/rootfs/ping");
    assert_eq!(
        xattr_names(&ping),
        ["security.capability", "user.empty", "user.note"]
    );
    assert_eq!(xattr(&ping, "user.note").unwrap(), b"hello\0world");
    assert_eq!(xattr(&ping, "security.capability").unwrap(), CAPABILITY);
    assert_eq!(xattr(&ping, "security.selinux"), None);
    // EROFS does not have ours.
    let world = World::new(content_of(&made)).by_fuse().mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    let (ping, plain) = (rootfs.join("ping"), rootfs.join("plain"));
    assert_eq!(
        xattr_names(&ping),
        ["security.capability", "user.empty", "user.note"]
    );
    assert_eq!(xattr(&ping, "user.note").unwrap(), b"hello\0world");
    assert_eq!(xattr(&ping, "user.empty").unwrap(), b"");
    assert_eq!(xattr(&ping, "security.capability").unwrap(), CAPABILITY);
    assert_eq!(xattr(&ping, "security.selinux"), None);
    assert_eq!(xattr(&rootfs.join("d"), "user.dir").unwrap(), b"1");
    assert_eq!(xattr_names(&plain), [""; 0]);

    assert_eq!(xattr(&plain, "user.registryfs.layer").unwrap(), b"0");
    assert_eq!(xattr(&ping, "user.registryfs.layer").unwrap(), b"1");
    assert_eq!(xattr(&rootfs.join("d"), "user.registryfs.layer").unwrap(), b"0");
    let digest = Digest::of(&noise(9000, 1)).to_string();
    assert_eq!(
        xattr(&plain, "user.registryfs.digest").unwrap(),
        digest.as_bytes()
    );
    assert_eq!(xattr(&plain, "user.registryfs.cached").unwrap(), b"0");
    fs::read(&plain).unwrap();
    assert_eq!(xattr(&plain, "user.registryfs.cached").unwrap(), b"9000");
    let digest = made.digest().to_string();
    assert_eq!(
        xattr(&world.at("team/app/1.0"), "user.registryfs.digest").unwrap(),
        digest.as_bytes()
    );
    assert_eq!(xattr(&plain, "user.registryfs.nothing"), None);
}

#[test]
fn sizes_blocks_and_space_are_sensible() {
    let link = crate::support::link("link", Kind::Symlink, "some/where");
    let made = image(&[&[file("a", noise(10_000, 1)), file("empty", ""), link]]);
    let world = World::new(content_of(&made)).mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    let a = fs::metadata(rootfs.join("a")).unwrap();
    assert_eq!((a.size(), a.blocks()), (10_000, 24));
    assert_eq!(fs::read(rootfs.join("empty")).unwrap(), b"");
    let link = fs::symlink_metadata(rootfs.join("link")).unwrap();
    assert_eq!((link.len(), link.mode() & 0o7777), (10, 0o777));
    let space = rustix::fs::statvfs(&rootfs).unwrap();
    assert!(space.f_blocks > 0 && space.f_bavail == 0 && space.f_files > 3);
    assert!(space.f_namemax >= 255);
}

#[test]
fn nothing_can_be_written() {
    let made = image(&[&[file("a", "a"), dir("d/")]]);
    let world = World::new(content_of(&made)).mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    let a = rootfs.join("a");
    assert_eq!(errno(fs::write(&a, "b")), libc::EROFS);
    assert_eq!(errno(fs::write(rootfs.join("new"), "b")), libc::EROFS);
    assert_eq!(errno(fs::remove_file(&a)), libc::EROFS);
    assert_eq!(errno(fs::rename(&a, rootfs.join("b"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(rootfs.join("e"))), libc::EROFS);
    assert_eq!(errno(std::os::unix::fs::chown(&a, Some(1), None)), libc::EROFS);
    assert_eq!(read(&a), "a");
}

#[test]
fn wrong_operations_get_their_errno() {
    let made = image(&[&[file("a", "a"), dir("d/")]]);
    let world = World::new(content_of(&made)).mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    assert_eq!(errno(fs::metadata(rootfs.join("a/b"))), libc::ENOTDIR);
    assert_eq!(errno(fs::read_link(rootfs.join("a"))), libc::EINVAL);
    assert_eq!(errno(fs::read(rootfs.join("d"))), libc::EISDIR);
    for at in [&rootfs, &world.at("team/app/1.0/layers/0/fs")] {
        let absent = |length| errno(fs::metadata(at.join("n".repeat(length))));
        assert_eq!((absent(255), absent(256)), (libc::ENOENT, libc::ENAMETOOLONG));
    }
}

#[test]
fn a_layer_that_nobody_can_read_is_named_and_its_blob_can_be_had() {
    let mut encrypted = Layer::gzip(&[file("a", "a")]).unwrap();
    encrypted.media_type = Some("application/vnd.oci.image.layer.v1.tar+gzip+encrypted".to_owned());
    let made = ImageBuilder::new(vec![layer(&[file("b", "b")]), encrypted]).build();
    let world = World::new(content_of(&made)).mounted();
    let at = world.at("team/app/1.0");
    assert_eq!(errno(fs::metadata(at.join("rootfs"))), libc::EIO);
    let errors = world.errors();
    assert!(errors.contains("encrypted layers cannot be read"), "{errors}");
    assert!(read(&at.join("layers/1/format")).starts_with("gzip\n"));
    assert!(!names(&at.join("layers/1")).contains(&"toc.json".to_owned()));
    let mut packed = Vec::new();
    let mut blob = fs::File::open(at.join("layers/1/blob")).unwrap();
    blob.read_to_end(&mut packed).unwrap();
    assert_eq!(packed, *made.layers[1].blob());
    assert_eq!(read(&at.join("layers/0/fs/b")), "b");
}

#[test]
fn a_toc_that_nothing_promises_is_a_file_of_the_image() {
    let unannotated = layer(&[file("a", "a")]).without_annotations();
    let made = ImageBuilder::new(vec![unannotated]).docker().build();
    let world = World::new(content_of(&made)).mounted();
    let at = world.at("team/app/1.0");
    // As every engine unpacks it: to whom nobody vouches for the TOC, the blob is a gzip layer with one more file.
    assert_eq!(names(&at.join("rootfs")), ["a", "stargz.index.json"]);
    assert_eq!(read(&at.join("rootfs/a")), "a");
    assert_eq!(read(&at.join("layers/0/format")).lines().next(), Some("gzip"));
}

#[test]
fn large_directories_and_deep_paths_are_listed_whole() {
    let deep = vec!["deep"; 60].join("/");
    let mut entries: Vec<File> = (0..20_000)
        .map(|number| file(&format!("many/{number:05}"), ""))
        .collect();
    entries.push(file(&format!("{deep}/end"), "end"));
    let mut entry = Entry::new("many/dir", Kind::Dir);
    entry.mode = 0o700;
    entries.push((entry, Vec::new()));
    let world = World::new(content_of(&image(&[&entries]))).mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    let listed = names(&rootfs.join("many"));
    assert_eq!(listed.len(), 20_001);
    assert_eq!((listed[0].as_str(), listed[19_999].as_str()), ("00000", "19999"));
    assert_eq!(read(&rootfs.join(deep).join("end")), "end");
}
