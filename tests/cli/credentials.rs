//! Logins of other tools, as the command and a running daemon find them in the environment and the home directory.

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use registryfs::demo::{Account, Auth};

use crate::world::{World, code, errors, finish, start};

fn closed() -> World {
    let world = World::new();
    world
        .registry
        .handle()
        .update(|behaviour| behaviour.auth = Auth::Basic(Account::new("user", "hunter2")));
    world
}

/// A file with the login, in the format of every tool.
fn login(world: &World, file: &str) -> PathBuf {
    let (host, auth) = (world.registry.host(), STANDARD.encode("user:hunter2"));
    world.file(file, &format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#))
}

#[test]
fn the_command_finds_a_login_where_the_environment_leads() {
    let world = closed();
    let image = world.image("base/slim");
    let folder = login(&world, "elsewhere.json").parent().unwrap().to_owned();
    let refused = world.run(&["tags", &image]);
    assert_eq!(code(&refused), 3);
    let places = format!("no {}/.docker/config.json", folder.display());
    assert!(errors(&refused).contains(&places), "{}", errors(&refused));
    let mut command = world.command(&["tags", &image]);
    let found = finish(start(
        command
            .env("REGISTRY_AUTH_FILE", "elsewhere.json")
            .current_dir(folder),
    ));
    assert_eq!(code(&found), 0, "{}", errors(&found));
}

#[test]
fn a_helper_that_is_not_there_is_named() {
    let world = closed();
    let config = world.file("config.json", r#"{"credsStore":"nobody"}"#);
    let mut command = world.command(&["tags", &world.image("base/slim")]);
    let output = finish(start(command.env("DOCKER_CONFIG", config.parent().unwrap())));
    assert_eq!(code(&output), 3, "{}", errors(&output));
    let expected = "the credential helper docker-credential-nobody, which ";
    assert!(errors(&output).contains(expected), "{}", errors(&output));
}

#[test]
fn an_answer_from_memory_says_why_the_registry_was_not_asked() {
    let world = closed();
    let folder = login(&world, "config.json").parent().unwrap().to_owned();
    let tags = || {
        let mut command = world.command(&["tags", &world.image("base/slim")]);
        finish(start(
            command
                .env("DOCKER_CONFIG", &folder)
                .env("REGISTRYFS_TAG_TTL", "0"),
        ))
    };
    let fresh = tags();
    assert_eq!((code(&fresh), errors(&fresh).as_str()), (0, ""));
    world.file("config.json", r#"{"credsStore":"nobody"}"#);
    let stale = tags();
    assert_eq!((code(&stale), &stale.stdout), (0, &fresh.stdout));
    let said = errors(&stale);
    assert!(said.contains("docker-credential-nobody, which "), "{said}");
}

#[test]
fn a_daemon_finds_a_login_by_the_environment_of_its_mount() {
    let world = closed();
    let mountpoint = world.mountpoint("m");
    let folder = mountpoint.parent().unwrap().parent().unwrap().to_owned();
    let mut mount = world.command(&["mount", mountpoint.to_str().unwrap()]);
    // The daemon works in another directory.
    mount.env("REGISTRY_AUTH_FILE", "later.json").current_dir(folder);
    let output = finish(start(&mut mount));
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let image = mountpoint.join(world.image("base/slim:11"));
    std::fs::read_dir(&image).unwrap_err();
    login(&world, "later.json");
    std::fs::read_dir(&image).unwrap();
    let status = world.text(&["status"]);
    assert!(status.contains("later.json, entry "), "{status}");
    assert!(!status.contains("hunter2"), "{status}");
}
