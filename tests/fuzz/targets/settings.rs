//! TOML that users and other tools write.

use registryfs::config::Layer;
use registryfs::registry::parsers;

use crate::engine::{Shape, Target};

const HOSTS_WORDS: &[&[u8]] = &[
    b"server",
    b"[host.\"",
    b"[[host]]",
    b"capabilities",
    b"override_path",
    b"ca",
    b"client",
    b"skip_verify",
    b"header",
    b"=",
    b"\"",
    b"\"\"\"",
    b"[",
    b"]",
    b"{",
    b"}",
    b"https://",
    b"http://u:p@",
    b"\n",
    b".",
    b"true",
    b"pull",
    b"resolve",
    b"push",
    b"1979-05-27T07:32:00Z",
    b"0x",
    b"inf",
    b"#",
];
const CONFIG_WORDS: &[&[u8]] = &[
    b"[[mount]]",
    b"[registry.\"",
    b"[layout.\"x\"]",
    b"mirror",
    b"budget",
    b"tag_ttl_s",
    b"platform",
    b"proxy",
    b"credential",
    b"allow",
    b"deny",
    b"timeout_s",
    b"=",
    b"\"",
    b"[",
    b"]",
    b"{",
    b"}",
    b"\n",
    b"true",
    b"-1",
    b"18446744073709551616",
    b"20GiB",
    b"#",
];

pub(crate) fn targets() -> Vec<Target> {
    let hosts: [&str; 2] = [
        "server = \"https://r.example\"\ncapabilities = [\"pull\"]\n\n[host.\"https://mirror.example/v2/proxy\"]\n  capabilities = [\"pull\", \"resolve\"]\n  override_path = true\n  ca = [\"/a.pem\"]\n  client = [[\"/c.pem\", \"/k.pem\"]]\n  skip_verify = false\n  [host.\"https://mirror.example/v2/proxy\".header]\n    x-a = [\"1\", \"2\"]\n",
        "[host.\"http://localhost:5000\"]\nca = \"x.pem\"\nclient = \"y.pem\"\n[host.\"10.0.0.1\"]\n",
    ];
    let config = [
        "tag_ttl_s = 60\nallow = [\"docker.io\", \"*.example\"]\nbudget = \"20 GiB\"\nplain_layers = \"index\"\n\n[[mount]]\nsource = \"docker.io\"\nmountpoint = \"/mnt\"\n\n[registry.\"docker.io\"]\nplain_http = false\nca = [\"a.pem\"]\n\n[[registry.\"docker.io\".mirror]]\nurl = \"https://m.example\"\n",
    ];
    let bytes = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    vec![
        Target {
            name: "hosts-toml",
            seeds: bytes(&hosts),
            words: HOSTS_WORDS,
            run: Box::new(|input| {
                let mut shape = Shape::default();
                // Files are read as text.
                if let Ok(text) = std::str::from_utf8(input) {
                    shape.result(parsers::hosts_file(text), |shape, file| {
                        shape.count(file.len() as u64);
                        shape.count(file.matches("Base").count() as u64);
                    });
                }
                shape
            }),
        },
        Target {
            name: "config-toml",
            seeds: bytes(&config),
            words: CONFIG_WORDS,
            run: Box::new(|input| {
                let mut shape = Shape::default();
                if let Ok(text) = std::str::from_utf8(input) {
                    shape.result(Layer::parse(text, "input"), |shape, layer| {
                        let text = format!("{layer:?}");
                        shape.count(text.len() as u64);
                        shape.count(text.matches("None").count() as u64);
                    });
                }
                shape
            }),
        },
    ]
}
