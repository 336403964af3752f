//! Images and registries as they are met, not as they are meant: empty and repeated layers, names that are taken, missing
//! blobs, documents that are none, registries without a catalog.

use std::fs;

use bytes::Bytes;
use registryfs::demo::{Behaviour, Content, Fault, ImageBuilder, ImageIndex, Layer, Scope};
use registryfs::digest::Digest;

use crate::support::{file, image, layer, with_tokens};
use crate::world::{World, errno, names, noise, until};

#[test]
fn images_without_layers_or_with_the_same_one_twice_have_a_root() {
    let twice = layer(&[file("a", "a")]);
    let mut content = Content::new();
    content.add_tagged_image("team/app", "none", &ImageBuilder::new(Vec::new()).build());
    content.add_tagged_image("team/app", "empty", &image(&[&[], &[]]));
    let built = ImageBuilder::new(vec![twice.clone(), layer(&[file(".wh.a", "")]), twice]).build();
    content.add_tagged_image("team/app", "twice", &built);
    let world = World::new(content).mounted();
    assert_eq!(names(&world.at("team/app/none/rootfs")), [""; 0]);
    assert_eq!(names(&world.at("team/app/none/layers")), [""; 0]);
    assert_eq!(names(&world.at("team/app/empty/rootfs")), [""; 0]);
    assert_eq!(names(&world.at("team/app/empty/layers/1/fs")), [""; 0]);
    assert_eq!(names(&world.at("team/app/twice/rootfs")), ["a"]);
    assert_eq!(fs::read(world.at("team/app/twice/layers/2/fs/a")).unwrap(), b"a");
}

#[test]
fn a_tag_with_the_name_of_an_image_s_own_is_reached_by_its_reference() {
    let mut content = Content::new();
    for tag in ["rootfs", "layers", "V1.0_x-RC", "1.0"] {
        content.add_tagged_image("team/app", tag, &image(&[&[file("tag", tag)]]));
    }
    let world = World::new(content).mounted();
    let listed = names(&world.at("team/app"));
    assert!(
        listed.contains(&"V1.0_x-RC".to_owned()) && listed.contains(&"1.0".to_owned()),
        "{listed:?}"
    );
    assert_eq!(
        fs::read(world.at("team/app/V1.0_x-RC/rootfs/tag")).unwrap(),
        b"V1.0_x-RC"
    );
    for tag in ["rootfs", "layers"] {
        let path = world.at(&format!("team/app:{tag}/rootfs/tag"));
        assert_eq!(fs::read(path).unwrap(), tag.as_bytes());
        assert_eq!(errno(fs::metadata(world.at("team/app").join(tag))), libc::ENOENT);
        // What is listed can be looked up.
        assert!(!listed.contains(&tag.to_owned()), "{listed:?}");
    }
}

#[test]
fn an_index_without_the_mount_s_platform_shows_those_it_has() {
    let arm = ImageBuilder::new(vec![layer(&[file("arch", "arm64")])])
        .architecture("arm64")
        .build();
    let index = ImageIndex::new(vec![arm]);
    let mut content = Content::new();
    let digest = content.add_index("team/arm", &index);
    content.tag("team/arm", "1", digest);
    let world = World::with(content, Behaviour::default(), &["--platform", "linux/amd64"]).mounted();
    let at = world.at("team/arm:1");
    assert_eq!(names(&at), ["digest", "index.json", "platforms"]);
    assert_eq!(errno(fs::metadata(at.join("rootfs"))), libc::ENOENT);
    assert!(world.errors().contains("linux/arm64"), "{}", world.errors());
    assert_eq!(
        fs::read(at.join("platforms/linux-arm64/rootfs/arch")).unwrap(),
        b"arm64"
    );
}

#[test]
fn documents_that_are_none_are_named() {
    let mut content = Content::new();
    let oci = "application/vnd.oci.image.manifest.v1+json";
    let documents: [(&str, &str, &[u8]); 4] = [
        ("text", oci, b"<html>not found</html>"),
        ("empty", oci, b"{}"),
        (
            "schema1",
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            br#"{"schemaVersion":1}"#,
        ),
        ("deep", oci, &[b'['; 100_000]),
    ];
    for (tag, media_type, bytes) in documents {
        let digest = content.put_manifest("team/odd", media_type, Bytes::copy_from_slice(bytes));
        content.tag("team/odd", tag, digest);
    }
    let world = World::new(content).mounted();
    for (tag, ..) in documents {
        assert_eq!(
            errno(fs::metadata(world.at(&format!("team/odd:{tag}")))),
            libc::EIO,
            "{tag}"
        );
        assert_eq!(
            errno(fs::metadata(world.at(&format!("team/odd/{tag}/rootfs")))),
            libc::EIO,
            "{tag}"
        );
        assert!(
            world.errors().contains(&format!("team/odd:{tag}: EIO: ")),
            "{tag}: {}",
            world.errors()
        );
    }
    assert_eq!(names(&world.at("team/odd")).len(), documents.len());
}

#[test]
fn a_blob_that_is_not_there_fails_its_readers_only() {
    let gone = image(&[&[file("kept", noise(300_000, 1)), file("gone", noise(6_000_000, 2))]]);
    let fine = image(&[&[file("fine", "fine")]]);
    let mut content = Content::new();
    content.add_tagged_image("team/app", "gone", &gone);
    content.add_tagged_image("team/app", "fine", &fine);
    let world = World::new(content).mounted();
    let rootfs = world.at("team/app/gone/rootfs");
    assert_eq!(fs::read(rootfs.join("kept")).unwrap(), noise(300_000, 1));
    let digest = gone.layers[0].digest();
    world
        .handle()
        .edit(|content| content.remove_blob("team/app", &digest));
    assert_ne!(errno(fs::read(rootfs.join("gone"))), 0);
    assert!(world.errors().contains(&digest.to_string()), "{}", world.errors());
    assert_eq!(fs::read(rootfs.join("kept")).unwrap(), noise(300_000, 1));
    assert_eq!(fs::read(world.at("team/app/fine/rootfs/fine")).unwrap(), b"fine");
}

#[test]
fn a_layer_that_is_no_estargz_whatever_it_says_is_refused() {
    let mut cut = layer(&[file("a", noise(100_000, 1))]).blob().to_vec();
    cut.truncate(cut.len() - 20);
    let mut content = Content::new();
    let broken: [(&str, Vec<u8>); 4] = [
        ("cut", cut),
        ("noise", noise(5000, 1)),
        ("short", vec![0x1f, 0x8b]),
        ("nothing", Vec::new()),
    ];
    for (tag, blob) in &broken {
        let mut lying = Layer::raw(blob.clone(), Digest::of(blob));
        lying.annotations = layer(&[file("a", "a")]).annotations;
        content.add_tagged_image("team/app", *tag, &ImageBuilder::new(vec![lying]).build());
    }
    let world = World::new(content).mounted();
    for (tag, _) in &broken {
        assert_eq!(
            errno(fs::metadata(world.at(&format!("team/app/{tag}/rootfs")))),
            libc::EIO,
            "{tag}"
        );
        assert!(
            world.errors().contains(&format!("team/app/{tag}/rootfs: EIO")),
            "{}",
            world.errors()
        );
    }
}

#[test]
fn a_registry_without_a_catalog_lists_what_was_visited() {
    let mut content = Content::new();
    for repository in ["team/app", "team/tools/deep", "other"] {
        content.add_tagged_image(repository, "1.0", &image(&[&[file("a", "a")]]));
    }
    let behaviour = Behaviour {
        catalog: false,
        ..Behaviour::default()
    };
    let world = World::with(content, behaviour, &[]).mounted();
    assert_eq!(names(&world.at("")), [""; 0]);
    assert_eq!(names(&world.at("team/app")), ["1.0"]);
    fs::metadata(world.at("team/tools/deep/1.0/rootfs")).unwrap();
    fs::metadata(world.at("team/app/1.0/rootfs")).unwrap();
    until("what was visited is listed", || names(&world.at("")) == ["team"]);
    assert_eq!(names(&world.at("team")), ["app", "tools"]);
    assert_eq!(names(&world.at("team/tools")), ["deep"]);
}

#[test]
fn listings_come_page_by_page_with_and_without_links() {
    let mut content = Content::new();
    let one = image(&[&[file("a", "a")]]);
    for number in 0..250 {
        content.add_tagged_image("team/app", format!("t{number:03}"), &one);
        content.add_tagged_image(&format!("many/r{number:03}"), "1", &one);
    }
    for link_header in [true, false] {
        let behaviour = Behaviour {
            link_header,
            page_entries_max: 40,
            // Without links only a refusal says that a page cannot be larger.
            refuse_large_pages: !link_header,
            ..Behaviour::default()
        };
        let world = World::with(content.clone(), behaviour, &[]).mounted();
        assert_eq!(names(&world.at("team/app")).len(), 250, "{link_header}");
        assert_eq!(names(&world.at("")), ["many", "team"], "{link_header}");
        assert_eq!(names(&world.at("many")).len(), 250, "{link_header}");
    }
}

#[test]
fn a_listing_that_cannot_be_had_fails_and_comes_back() {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&[file("a", "a")]]));
    let world = World::with(content, Behaviour::default(), &["--retries", "0"]).mounted();
    let broken = Fault::Status {
        status: 500,
        retry_after: None,
    };
    world.handle().inject(Scope::containing("/tags/list"), broken);
    let list = || fs::read_dir(world.at("team/app")).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    assert_eq!(errno(list()), libc::EIO);
    assert!(world.errors().contains("readdir"), "{}", world.errors());
    world.handle().clear_faults();
    until("it is listed", || list().is_ok_and(|entries| entries.len() == 1));
}

#[test]
fn a_login_is_used_from_docker_s_own_file() {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&[file("a", "a")]]));
    let world = World::with(content, with_tokens("user", "hunter2"), &[]);
    let home = world.store().with_file_name(".docker");
    fs::create_dir(&home).unwrap();
    world.mount();
    assert_eq!(errno(fs::metadata(world.at("team/app:1.0"))), libc::EACCES);
    // Written while the daemon runs, as `docker login` would.
    let auths = format!(
        r#"{{"auths": {{"{}": {{"auth": "dXNlcjpodW50ZXIy"}}}}}}"#,
        world.registry.host()
    );
    fs::write(home.join("config.json"), auths).unwrap();
    until("the login is found", || {
        fs::metadata(world.at("team/app:1.0")).is_ok()
    });
    assert_eq!(fs::read(world.at("team/app/1.0/rootfs/a")).unwrap(), b"a");
}

#[test]
fn tags_can_be_checked_at_every_lookup() {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&[file("a", "old")]]));
    let world = World::new(content).configured("tag_ttl_s = 0\n").mounted();
    let path = world.at("team/app:1.0/rootfs/a");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    world
        .handle()
        .edit(|content| content.add_tagged_image("team/app", "1.0", &image(&[&[file("a", "new")]])));
    assert_eq!(fs::read(&path).unwrap(), b"new");
}
