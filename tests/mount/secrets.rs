//! No password, token or signature is ever written where somebody reads it.

use std::fs;
use std::path::Path;

use registryfs::demo::{Content, Endpoint, Fault, Redirect, Scope};

use crate::support::{file, image, with_tokens};
use crate::world::{World, finish, noise, start, stderr};

/// Every file below `dir` with its bytes.
fn files(dir: &Path, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&path, found),
            Ok(kind) if kind.is_file() => found.push((path.display().to_string(), fs::read(&path).unwrap())),
            _ => {}
        }
    }
}

#[test]
fn secrets_are_in_no_log_no_answer_and_no_file() {
    let made = image(&[&[file("a", noise(300_000, 1)), file("b", noise(900_000, 2))]]);
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &made);
    let mut behaviour = with_tokens("user", "hunter2");
    behaviour.redirect = Some(Redirect::default());
    let world = World::with(content, behaviour, &["--debug"]);
    let root = world.root();
    let mut mount = world.command(&["mount", root.to_str().unwrap()]);
    let mounted = finish(start(mount.env("REGISTRYFS_CREDENTIAL", "user:hunter2")));
    assert!(mounted.status.success(), "{}", stderr(&mounted));
    let rootfs = world.at("team/app/1.0/rootfs");
    fs::read(rootfs.join("a")).unwrap();
    // Each way to fail that could quote what was sent.
    let handle = world.handle();
    handle.expire_signed_urls();
    handle.expire_tokens();
    let forbidden = Fault::Status {
        status: 403,
        retry_after: None,
    };
    let failures = [
        (Scope::all().at(Endpoint::Storage), forbidden.clone()),
        (Scope::all().at(Endpoint::Storage), Fault::Reset),
        (Scope::all().at(Endpoint::Token), forbidden),
    ];
    let mut outputs = vec![mounted];
    for (number, (scope, fault)) in failures.into_iter().enumerate() {
        handle.inject(scope, fault);
        handle.expire_signed_urls();
        handle.expire_tokens();
        let reference = format!("{}/team/app:none{number}", world.registry.host());
        outputs.push(world.run(&["digest", &reference]));
        outputs.push(world.run(&["cat", &format!("{}/team/app:1.0", world.registry.host()), "/b"]));
        fs::read(rootfs.join("b")).unwrap_err();
        handle.clear_faults();
    }
    outputs.push(world.run(&["status", "--format", "json"]));
    let mut texts: Vec<(String, Vec<u8>)> = Vec::new();
    for output in outputs {
        texts.push(("stdout".to_owned(), output.stdout));
        texts.push(("stderr".to_owned(), output.stderr));
    }
    texts.push(("errors".to_owned(), world.errors().into()));
    texts.push(("status.json".to_owned(), world.status().to_string().into()));
    let cmdline = format!("/proc/{}/cmdline", world.daemon());
    texts.push((cmdline.clone(), fs::read(&cmdline).unwrap()));
    files(&world.store(), &mut texts);
    assert!(!world.errors().is_empty());
    assert!(world.log().len() > 1000, "the log is at its most talkative");
    // The password, and user:password as basic authentication spells it, and what stands before tokens and signatures.
    let secrets = ["hunter2", "dXNlcjpodW50ZXIy", "Signature=", "Bearer "];
    for (name, bytes) in texts {
        let text = String::from_utf8_lossy(&bytes);
        for secret in secrets {
            assert!(!text.contains(secret), "{name} has {secret}");
        }
    }
}
