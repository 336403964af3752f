//! What refers to a manifest: by the API, in pages, and by the tag that stands in for it.

use registryfs::digest::Digest;
use registryfs::error::{Error, Result};

use crate::client;
use crate::server::{Reply, Request, Server};

const TYPE: &str = "application/vnd.amazon.soci.index.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn subject() -> Digest {
    Digest::of(b"subject")
}

/// A list of entries, each with a number and a type.
fn list(entries: &[(u8, &str)]) -> String {
    let entries: Vec<String> = entries
        .iter()
        .map(|(number, artifact_type)| {
            let digest = Digest::of(&[*number]);
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":1,"artifactType":"{artifact_type}"}}"#
            )
        })
        .collect();
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{}]}}"#,
        entries.join(",")
    )
}

fn page(entries: &[(u8, &str)]) -> Reply {
    Reply::new(200).header("Content-Type", INDEX).body(list(entries))
}

async fn ask(server: &Server) -> Result<Vec<Digest>> {
    let repository = crate::repository(server, "a/b");
    client().referrers(&repository, &subject(), TYPE).await
}

fn digests(numbers: &[u8]) -> Vec<Digest> {
    numbers.iter().map(|number| Digest::of(&[*number])).collect()
}

#[tokio::test]
async fn the_api_is_asked_for_one_type_and_not_relied_upon_to_filter() {
    let server = Server::start(|_| page(&[(1, "x/y"), (2, TYPE), (3, TYPE)])).await;
    assert_eq!(ask(&server).await.unwrap(), digests(&[2, 3]));
    let requests = server.requests();
    let of_api: Vec<&Request> = requests
        .iter()
        .filter(|request| request.path().contains("/referrers/"))
        .collect();
    assert_eq!(of_api.len(), 1);
    assert_eq!(of_api[0].path(), format!("/v2/a/b/referrers/{}", subject()));
    assert_eq!(of_api[0].query("artifactType"), [TYPE]);
    assert_eq!(of_api[0].header("accept"), Some(INDEX));
    assert_eq!(server.count("/manifests/"), 0);
}

#[tokio::test]
async fn pages_are_followed_to_their_end() {
    let server = Server::start(|request| match request.query("page").pop().as_deref() {
        None => page(&[(1, TYPE)]).header("Link", format!("<{}&page=2>; rel=\"next\"", request.target)),
        Some("2") => page(&[]).header("Link", "<?page=3>; rel=\"next\""),
        Some(_) => page(&[(2, TYPE)]),
    })
    .await;
    assert_eq!(ask(&server).await.unwrap(), digests(&[1, 2]));
    assert_eq!(server.count("/referrers/"), 3);
}

#[tokio::test]
async fn lists_without_end_and_links_elsewhere_are_refused() {
    let endless = Server::start(|_| page(&[(1, TYPE)]).header("Link", "<?again>; rel=\"next\"")).await;
    let error = ask(&endless).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    assert!(endless.count("/referrers/") < 50);
    let other = Server::start(|_| page(&[])).await;
    let link = format!("<http://{}/v2/a/b/referrers/x>; rel=\"next\"", other.host());
    let server = Server::start(move |_| page(&[]).header("Link", link.clone())).await;
    let error = ask(&server).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test]
async fn a_registry_without_the_api_is_asked_for_the_tag() {
    let tag = format!("/v2/a/b/manifests/sha256-{}", subject().hex());
    for unknown in [
        Reply::error(404, "NOT_FOUND"),
        Reply::error(405, "UNSUPPORTED"),
        Reply::error(400, "INVALID"),
        Reply::new(406),
        Reply::new(200).header("Content-Type", "text/html").body("<html>"),
    ] {
        let path = tag.clone();
        let server = Server::start(move |request| match request.path() == path {
            true => page(&[(4, "x/y"), (5, TYPE)]),
            false => unknown.clone(),
        })
        .await;
        assert_eq!(ask(&server).await.unwrap(), digests(&[5]));
        assert_eq!(server.count("/manifests/"), 1);
    }
}

#[tokio::test]
async fn nothing_refers_to_it_where_there_is_neither_list_nor_tag() {
    let server = Server::start(|_| Reply::error(404, "NOT_FOUND")).await;
    assert_eq!(ask(&server).await.unwrap(), []);
}

#[tokio::test]
async fn a_refusal_is_no_empty_list() {
    for (status, is_meant) in [(403, "denied"), (500, "network")] {
        let server = Server::start(move |_| Reply::error(status, "DENIED")).await;
        let error = ask(&server).await.unwrap_err();
        let as_meant = match is_meant {
            "denied" => matches!(error, Error::Denied { .. }),
            _ => error.is_network(),
        };
        assert!(as_meant, "{status}: {error}");
    }
}

#[tokio::test]
async fn an_answer_that_is_no_list_is_refused() {
    for body in ["", "[]", "{", r#"{"manifests":7}"#] {
        let server = Server::start(move |_| Reply::new(200).header("Content-Type", INDEX).body(body)).await;
        let error = ask(&server).await.unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{body}: {error}");
    }
    let odd = r#"{"manifests":[{"digest":"sha512:00","artifactType":"application/vnd.amazon.soci.index.v1+json"}]}"#;
    let server = Server::start(move |_| Reply::new(200).header("Content-Type", INDEX).body(odd)).await;
    assert_eq!(ask(&server).await.unwrap(), [], "a digest that we cannot check");
}
