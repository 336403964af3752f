//! SOCI: zTOCs under the digest that an index names, for a layer that is what it is.

use registryfs::layer::index::Index;
use registryfs::layer::soci::writer::Layout;

use crate::engine::{Shape, Target};
use crate::layers::{Beside, check_index, decode, index_of};
use crate::samples::{Layer, soci, soci_within_bytes};

pub(crate) fn targets() -> Vec<Target> {
    let mut layers = [Layout::Gzip, Layout::GzipV1, Layout::Uncompressed]
        .map(soci)
        .to_vec();
    layers.push(soci_within_bytes());
    vec![Target {
        name: "soci-ztoc",
        seeds: layers.iter().map(|layer| layer.ztoc.clone().unwrap()).collect(),
        words: &[
            b"reg",
            b"dir",
            b"symlink",
            b"hardlink",
            b"char",
            b"fifo",
            b"sha256:",
            b"0.9",
            b"\x00\x00\x00\x00",
            b"\x04\x00\x00\x00",
            b"\xff\xff\xff\xff",
            b"SCHILY.xattr.user.x",
        ],
        run: Box::new(move |ztoc| {
            let mut shape = Shape::default();
            // Which layer it is for is nothing that it says.
            layers.iter().for_each(|layer| try_out(layer, ztoc, &mut shape));
            shape
        }),
    }]
}

fn try_out(layer: &Layer, ztoc: &[u8], shape: &mut Shape) {
    let beside = Beside {
        ztoc: Some(ztoc),
        external_toc: None,
    };
    shape.result(
        index_of(&layer.descriptor, &layer.blob, beside),
        |shape, index| match index {
            Some(index) => {
                check_index(&index, shape);
                decode(&Index::open(index.as_slice()).unwrap(), &layer.blob, shape);
            }
            None => shape.note("pass"),
        },
    );
}
