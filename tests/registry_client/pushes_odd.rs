//! Pushing to registries that do not get on.

use registryfs::registry::Pushed;

use super::pushes::upload;
use super::server::{Reply, Request, Server};
use super::{blob, client, repository};

fn at(status: u16, arrived: usize) -> Reply {
    Reply::new(status)
        .header("Location", "/v2/a/blobs/uploads/0")
        .header("Range", format!("0-{}", arrived - 1))
}

#[tokio::test]
async fn a_registry_that_takes_no_more_of_a_blob_is_given_up() {
    // It refuses each piece, takes none of it, or forgets some of what it had.
    for patch in [at(416, 1000), at(202, 1000), at(416, 900)] {
        let cut = |request: &Request| (request.method == "PUT").then_some(1000);
        let server = Server::start_cutting(cut, move |request| match request.method.as_str() {
            "HEAD" => Reply::new(404),
            "POST" => at(202, 1),
            "GET" => at(204, 1000),
            "PATCH" => patch.clone(),
            _ => Reply::new(204),
        })
        .await;
        let push = upload(&blob(100_000).0);
        let error = client().push_blob(&repository(&server, "a"), &push).await;
        let error = error.unwrap_err();
        assert!(error.is_network(), "{error}");
        assert!(error.to_string().contains("1000 bytes"), "{error}");
        assert!(server.requests().len() < 40, "{}", server.requests().len());
    }
}

#[tokio::test]
async fn a_blob_that_the_registry_has_in_another_size_is_sent_again() {
    let (bytes, _) = blob(100);
    for (length, expected) in [(99, Pushed::Sent), (0, Pushed::Present), (100, Pushed::Present)] {
        let server = Server::start(move |request| match request.method.as_str() {
            "HEAD" => Reply::new(200).body(vec![0; length]),
            "POST" => at(202, 1),
            _ => Reply::new(201),
        })
        .await;
        let push = upload(&bytes);
        let pushed = client().push_blob(&repository(&server, "a"), &push).await;
        assert_eq!(pushed.unwrap(), expected, "{length}");
    }
}
