//! Which files hold credentials, in which order they are asked, and what of the environment decides that. The
//! environment is a value here: the command takes it from its process, tests make their own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What of a process's environment leads to credentials. The default leads nowhere: no files, no helpers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CredentialEnvironment {
    /// `$REGISTRY_AUTH_FILE`: a file in the format of podman and skopeo that is asked first.
    pub registry_auth_file: Option<PathBuf>,
    /// `$XDG_RUNTIME_DIR`.
    pub xdg_runtime_dir: Option<PathBuf>,
    /// `$XDG_CONFIG_HOME`; without it `.config` in the home directory.
    pub xdg_config_home: Option<PathBuf>,
    /// `$DOCKER_CONFIG`: the directory of docker's `config.json`; without it `.docker` in the home directory.
    pub docker_config: Option<PathBuf>,
    /// The home directory.
    pub home: Option<PathBuf>,
    /// The number of the user, whose login by podman is in `/run/containers/UID` where there is no
    /// `$XDG_RUNTIME_DIR`.
    pub uid: Option<u32>,
    /// `$PATH`, where credential helpers are looked for.
    pub path: Option<OsString>,
}

impl CredentialEnvironment {
    /// That of this process. A service may run without `$HOME`: then the home directory is the one that the user
    /// database has.
    #[must_use]
    pub fn of_process() -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let uid = nix::unistd::geteuid();
        let home_of_user = || {
            nix::unistd::User::from_uid(uid)
                .ok()
                .flatten()
                .map(|user| user.dir)
        };
        Self {
            registry_auth_file: set("REGISTRY_AUTH_FILE").map(PathBuf::from),
            xdg_runtime_dir: set("XDG_RUNTIME_DIR").map(PathBuf::from),
            xdg_config_home: set("XDG_CONFIG_HOME").map(PathBuf::from),
            docker_config: set("DOCKER_CONFIG").map(PathBuf::from),
            home: set("HOME").map(PathBuf::from).or_else(home_of_user),
            uid: Some(uid.as_raw()),
            path: set("PATH"),
        }
    }

    /// The files, first to last, each once.
    pub(super) fn places(&self) -> Vec<Place> {
        let at = |folder: Option<&PathBuf>, file: &str| folder.map(|folder| folder.join(file));
        let in_home = |file: &str| at(self.home.as_ref(), file);
        let of_user = || Some(PathBuf::from(format!("/run/containers/{}/auth.json", self.uid?)));
        let candidates = [
            (self.registry_auth_file.clone(), Kind::Containers),
            (
                at(self.xdg_runtime_dir.as_ref(), "containers/auth.json").or_else(of_user),
                Kind::Containers,
            ),
            (
                at(self.xdg_config_home.as_ref(), "containers/auth.json")
                    .or_else(|| in_home(".config/containers/auth.json")),
                Kind::Containers,
            ),
            (
                at(self.docker_config.as_ref(), "config.json").or_else(|| in_home(".docker/config.json")),
                Kind::Docker,
            ),
            (in_home(".dockercfg"), Kind::OldDocker),
        ];
        let mut places: Vec<Place> = Vec::new();
        for (path, kind) in candidates {
            let Some(path) = path else { continue };
            let same = |place: &Place| place.path == path && place.kind == kind;
            if !places.iter().any(same) {
                places.push(Place { path, kind });
            }
        }
        places
    }
}

/// Whose file it is. The formats are nearly the same; what they mean differs in places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::registry) enum Kind {
    /// `auth.json` of podman, skopeo and buildah (containers-auth.json(5)).
    Containers,
    /// `config.json` of docker.
    Docker,
    /// `.dockercfg`, which is what later became `auths` alone.
    OldDocker,
}

/// A file that may hold credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

impl Place {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(environment: &CredentialEnvironment) -> Vec<String> {
        let places = environment.places();
        places
            .iter()
            .map(|place| place.path.display().to_string())
            .collect()
    }

    #[test]
    fn files_are_where_the_tools_that_log_in_put_them() {
        let root = CredentialEnvironment {
            home: Some("/root".into()),
            uid: Some(0),
            ..CredentialEnvironment::default()
        };
        let expected = [
            "/run/containers/0/auth.json",
            "/root/.config/containers/auth.json",
            "/root/.docker/config.json",
            "/root/.dockercfg",
        ];
        assert_eq!(paths(&root), expected);
        let user = CredentialEnvironment {
            registry_auth_file: Some("/a/f.json".into()),
            xdg_runtime_dir: Some("/run/user/7".into()),
            xdg_config_home: Some("/c".into()),
            docker_config: Some("/d".into()),
            home: Some("/home/u".into()),
            uid: Some(7),
            path: None,
        };
        let expected = [
            "/a/f.json",
            "/run/user/7/containers/auth.json",
            "/c/containers/auth.json",
            "/d/config.json",
            "/home/u/.dockercfg",
        ];
        assert_eq!(paths(&user), expected);
        let same = CredentialEnvironment {
            registry_auth_file: Some("/run/user/7/containers/auth.json".into()),
            ..user
        };
        assert_eq!(paths(&same).len(), 4, "a file is asked once");
        assert!(CredentialEnvironment::default().places().is_empty());
    }

    #[test]
    fn a_process_has_a_home_directory_even_where_the_environment_has_none() {
        let found = CredentialEnvironment::of_process();
        assert!(found.home.is_some_and(|home| home.is_absolute()));
        assert_eq!(found.uid, Some(nix::unistd::geteuid().as_raw()));
    }
}
