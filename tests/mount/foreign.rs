//! Foreign layers: the registry has the manifest, and another server, named by a URL in it, has the layer.

use std::fs;

use registryfs::demo::{Behaviour, Content, DemoRegistry, ImageBuilder};
use registryfs::digest::Digest;

use crate::support::{file, layer, with_tokens};
use crate::world::{World, errno, first_byte, noise};

const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

/// A layer that only the other server has, that server, and a registry with an image of it on top of one of its own.
fn foreign() -> (Content, DemoRegistry) {
    let entries = [
        file("small", "far away"),
        file("large", noise(600_000, 1)),
        file("other", noise(600_000, 2)),
    ];
    let mut layer_far = layer(&entries);
    let mut far = Content::new();
    let digest = far.put_blob("far/away", layer_far.blob().clone());
    let far = DemoRegistry::start(far, Behaviour::default()).unwrap();
    layer_far.urls = vec![format!(
        "http://{}/v2/far/away/blobs/{digest}?sig=S3CRET",
        far.host()
    )];
    layer_far.media_type = Some(FOREIGN.to_owned());
    let image = ImageBuilder::new(vec![layer(&[file("near", "near")]), layer_far]).build();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image);
    content.remove_blob("team/app", &digest);
    (content, far)
}

fn paths(server: &DemoRegistry) -> Vec<String> {
    let records = server.handle().ledger();
    records
        .iter()
        .map(|record| format!("{} {:?}", record.path, record.range))
        .collect()
}

#[test]
fn a_foreign_layer_is_read_by_ranges_from_its_url() {
    let (content, far) = foreign();
    let behaviour = with_tokens("user", "secret");
    let options = ["--credential", "user:secret", "--debug"];
    let world = World::with(content, behaviour, &options).mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    assert_eq!(fs::read(rootfs.join("small")).unwrap(), b"far away");
    assert_eq!(fs::read(rootfs.join("near")).unwrap(), b"near");
    // The tail with the TOC, and the member.
    assert_eq!(far.handle().ledger().len(), 2, "{:#?}", paths(&far));
    far.handle().clear_ledger();
    let (_, near) = world.requests(|| first_byte(&rootfs.join("other")));
    assert_eq!(near.len(), 0, "{near:#?}");
    let asked = far.handle().ledger();
    assert_eq!(asked.len(), 1, "{:#?}", paths(&far));
    assert!(asked[0].range.is_some() && !asked[0].had_authorization);
    assert_eq!(fs::read(rootfs.join("large")).unwrap(), noise(600_000, 1));
    let blob = fs::read(world.at("team/app/1.0/layers/1/blob")).unwrap();
    let digest = fs::read_to_string(world.at("team/app/1.0/layers/1/digest")).unwrap();
    assert_eq!(format!("{}\n", Digest::of(&blob)), digest);
    assert!(
        far.handle()
            .ledger()
            .iter()
            .all(|record| !record.had_authorization)
    );
    assert!(!world.log().contains("S3CRET"), "{}", world.log());
}

#[test]
fn a_foreign_layer_that_is_kept_out_or_gone_says_why() {
    let (content, far) = foreign();
    let deny = format!("deny = [{:?}]\n", far.host());
    let world = World::new(content.clone()).configured(&deny).mounted();
    assert_eq!(errno(fs::read(world.at("team/app/1.0/rootfs/small"))), libc::EIO);
    let errors = world.errors();
    assert!(errors.contains("allow and deny"), "{errors}");
    assert!(!errors.contains("S3CRET"), "{errors}");
    assert!(far.handle().ledger().is_empty(), "{:#?}", paths(&far));
    let host = far.host();
    drop(far);
    let world = World::new(content).mounted();
    assert_eq!(errno(fs::read(world.at("team/app/1.0/rootfs/small"))), libc::EIO);
    let errors = world.errors();
    assert!(errors.contains(&host) && !errors.contains("S3CRET"), "{errors}");
}
