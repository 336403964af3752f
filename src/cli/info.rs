//! `registryfs info`.

use std::ffi::OsString;

use clap::Args;

use super::context::{Context, path_bytes};
use super::globals::Format;
use super::output::{Output, note};
use super::text::{date, human_bytes, mode_text, size_text, table, visible_name};
use crate::daemon::Query;
use crate::error::Result;
use crate::image::answers::{FileInfo, ImageInfo, IndexedLayer};

/// Tell what is known about an image, or a file of it
#[derive(Debug, Args)]
pub(super) struct Info {
    /// The image
    reference: String,
    /// The path in it
    path: Option<OsString>,
}

impl Info {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let image = context.image(&self.reference);
        let session = context.session();
        if self.path.is_some() {
            let path = path_bytes(self.path.as_ref());
            let file: FileInfo = session.ask(Query::FileInfo { image, path }).await?;
            return match out.format {
                Format::Json => out.json(&file),
                Format::Text => out.pairs(&file_pairs(&file)),
            };
        }
        let info: ImageInfo = session.ask(Query::Info { image }).await?;
        out.note_stale(info.resolved.stale.as_deref());
        if out.format == Format::Json {
            return out.json(&info);
        }
        for warning in &info.warnings {
            note(&format!("warning: {warning}"));
        }
        out.pairs(&image_pairs(&info))?;
        out.line("")?;
        let lines = table(&layer_rows(&info), &[0, 3, 4, 5, 6, 7]);
        lines.iter().try_for_each(|line| out.line(line))?;
        for refused in info.layers.iter().filter_map(|layer| layer.refused.as_ref()) {
            note(&format!("warning: {refused}"));
        }
        Ok(())
    }
}

fn image_pairs(info: &ImageInfo) -> Vec<(&'static str, String)> {
    let mut pairs = vec![
        ("reference", info.resolved.reference.clone()),
        ("digest", info.resolved.digest.to_string()),
        ("media type", visible_name(&info.resolved.media_type)),
        ("platform", info.platform.to_string()),
    ];
    if !info.platforms.is_empty() {
        let names: Vec<String> = info.platforms.iter().map(ToString::to_string).collect();
        pairs.push(("platforms", visible_name(&names.join(" "))));
        pairs.push(("manifest", info.manifest.to_string()));
    }
    let unknown = || "not known before all layers have been read".to_owned();
    let inodes = info.inodes.map_or_else(unknown, |inodes| inodes.to_string());
    pairs.push(("inodes", inodes));
    pairs.push(("size", info.bytes.map_or_else(unknown, human_bytes)));
    if let Some(served_by) = &info.served_by {
        pairs.push(("served by", served_by.clone()));
    }
    pairs
}

fn layer_rows(info: &ImageInfo) -> Vec<Vec<String>> {
    let head = [
        "LAYER", "FORMAT", "READ", "BLOB", "UNPACKED", "INDEX", "CACHED", "ENTRIES", "DIGEST",
    ];
    let rows = info.layers.iter().enumerate().map(|(number, layer)| {
        let of_index = |of: fn(&IndexedLayer) -> String| layer.indexed.as_ref().map_or("-".to_owned(), of);
        vec![
            number.to_string(),
            layer.format.clone(),
            layer.reading.clone(),
            human_bytes(layer.blob_bytes),
            of_index(|index| human_bytes(index.unpacked_bytes)),
            of_index(|index| human_bytes(index.index_bytes)),
            of_index(|index| human_bytes(index.cached_bytes)),
            of_index(|index| index.entries.to_string()),
            layer.digest.to_string(),
        ]
    });
    std::iter::once(head.map(str::to_owned).to_vec())
        .chain(rows)
        .collect()
}

fn file_pairs(file: &FileInfo) -> Vec<(&'static str, String)> {
    let mut pairs = vec![
        ("path", visible_name(&file.name)),
        ("kind", file.kind.clone()),
        ("mode", mode_text(&file.kind, file.mode)),
        ("uid", file.uid.to_string()),
        ("gid", file.gid.to_string()),
        (
            if file.rdev.is_some() { "device" } else { "size" },
            size_text(file),
        ),
        ("mtime", date(file.mtime)),
        ("links", file.nlink.to_string()),
        ("layer", file.layer.to_string()),
    ];
    if let Some(target) = &file.target {
        pairs.push(("target", visible_name(target)));
    }
    if let Some(digest) = &file.digest {
        pairs.push(("digest", digest.to_string()));
    }
    if file.kind == "file" {
        pairs.push(("cached", file.cached_bytes.to_string()));
    }
    pairs
}
