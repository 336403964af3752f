//! Lists in pages, and registries whose lists do not end.

use registryfs::error::{Error, Result};
use registryfs::registry::Pager;

use super::client;
use super::repository;
use super::server::{Reply, Request, Server};

async fn all(mut pager: Pager) -> Result<Vec<String>> {
    let mut names = Vec::new();
    while let Some(page) = pager.next_page().await? {
        names.extend(page);
    }
    Ok(names)
}

async fn tags(server: &Server) -> Result<Vec<String>> {
    all(client().tags(&repository(server, "a"))).await
}

fn page(names: &[String]) -> Reply {
    let json = serde_json::json!({ "name": "a", "tags": names });
    Reply::new(200).body(json.to_string())
}

/// `t0000` and so on.
fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("t{n:05}")).collect()
}

/// The page of `names` that `request` asks for, at most `page_max` of them; and whether there is more.
fn part(request: &Request, names: &[String], page_max: usize) -> (Vec<String>, bool) {
    let asked = request
        .query("n")
        .first()
        .map_or(page_max, |n| n.parse().unwrap());
    let last = request.query("last").pop().unwrap_or_default();
    let rest: Vec<String> = names.iter().filter(|name| **name > last).cloned().collect();
    let count = asked.min(page_max).min(rest.len());
    (rest[..count].to_vec(), count < rest.len())
}

#[tokio::test]
async fn links_are_followed_relative_and_absolute() {
    for absolute in [false, true] {
        let known = names(250);
        let server = Server::start(move |request| {
            let (part, more) = part(request, &known, 100);
            let prefix = match absolute {
                true => format!("http://{}", request.header("host").unwrap()),
                false => String::new(),
            };
            let link = format!(
                "<{prefix}/v2/a/tags/list?n=100&last={}>; rel=\"next\"",
                part.last().unwrap()
            );
            match more {
                true => page(&part).header("Link", link),
                false => page(&part),
            }
        })
        .await;
        assert_eq!(tags(&server).await.unwrap(), names(250));
        assert_eq!(server.requests().len(), 3);
        assert_eq!(server.requests()[0].query("n"), ["1000"]);
    }
}

#[tokio::test]
async fn a_full_page_without_a_link_may_have_a_successor() {
    let known = names(2500);
    let server = Server::start(move |request| page(&part(request, &known, 1000).0)).await;
    assert_eq!(tags(&server).await.unwrap(), names(2500));
    assert_eq!(server.requests().len(), 3);
}

#[tokio::test]
async fn a_registry_that_knows_no_pages_is_understood() {
    for count in [0, 1, 999, 1000, 1001, 5000] {
        let server = Server::start(move |_| page(&names(count))).await;
        assert_eq!(tags(&server).await.unwrap(), names(count), "{count}");
        assert!(server.requests().len() <= 2);
    }
    let server = Server::start(|_| Reply::new(200).body(r#"{"name":"a","tags":null}"#)).await;
    assert!(tags(&server).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_page_size_that_a_registry_refuses_is_made_smaller() {
    for limit in [100, 10, 0] {
        let known = names(25);
        let server = Server::start(move |request| match request.query("n").pop() {
            Some(n) if n.parse::<usize>().unwrap() > limit => Reply::error(400, "PAGINATION_NUMBER_INVALID"),
            _ => page(&part(request, &known, 100).0),
        })
        .await;
        assert_eq!(tags(&server).await.unwrap(), names(25), "{limit}");
    }
    let server = Server::start(|_| Reply::error(400, "PAGINATION_NUMBER_INVALID")).await;
    assert!(tags(&server).await.is_err());
    assert!(server.requests().len() <= 5);
}

#[tokio::test]
async fn lists_that_do_not_end_are_ended() {
    let circle = |_: &Request| page(&names(2)).header("Link", "</v2/a/tags/list?last=x>; rel=\"next\"");
    let zigzag = |request: &Request| {
        let next = if request.query("last") == ["x"] { "y" } else { "x" };
        page(&[format!("from-{next}")]).header("Link", format!("</v2/a/tags/list?last={next}>; rel=\"next\""))
    };
    let empty = |request: &Request| {
        let n: u32 = request.query("last").pop().map_or(0, |n| n.parse().unwrap());
        page(&[]).header("Link", format!("</v2/a/tags/list?last={}>; rel=\"next\"", n + 1))
    };
    let handlers: [fn(&Request) -> Reply; 3] = [circle, zigzag, empty];
    for (index, handler) in handlers.into_iter().enumerate() {
        let server = Server::start(handler).await;
        let got = tags(&server).await;
        // The same page over and over is a registry that ignores where it was asked to begin.
        match index {
            0 => assert_eq!(got.unwrap(), names(2)),
            _ => assert!(matches!(got, Err(Error::Malformed { .. })), "{index}: {got:?}"),
        }
        assert!(server.requests().len() < 50, "{index}");
    }
}

#[tokio::test]
async fn a_link_to_elsewhere_is_not_followed() {
    let other = Server::start(|_| page(&names(1))).await;
    let link = format!("<http://{}/v2/a/tags/list>; rel=\"next\"", other.host());
    let server = Server::start(move |_| page(&names(1)).header("Link", link.clone())).await;
    let got = tags(&server).await;
    assert!(matches!(got, Err(Error::Malformed { .. })), "{got:?}");
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test]
async fn names_that_could_not_be_asked_for_are_left_out() {
    let server = Server::start(|_| {
        let hostile = ["ok", "", "../x", "a/b", "-x", "a\nb", "x\u{0}"].map(str::to_owned);
        page(&hostile)
    })
    .await;
    assert_eq!(tags(&server).await.unwrap(), ["ok"]);
}

#[tokio::test]
async fn the_catalog_lists_repositories_or_says_that_there_is_none() {
    let server = Server::start(|_| Reply::new(200).body(r#"{"repositories":["a","b/c","UP","d"]}"#)).await;
    let got = all(client().catalog(&server.host())).await.unwrap();
    assert_eq!(got, ["a", "b/c", "d"]);
    assert_eq!(server.lines(), ["GET /v2/_catalog"]);

    for (status, code) in [
        (401, "UNAUTHORIZED"),
        (403, "DENIED"),
        (404, "NOT_FOUND"),
        (405, "UNSUPPORTED"),
        (400, "UNSUPPORTED"),
    ] {
        let server = Server::start(move |_| Reply::error(status, code)).await;
        let error = all(client().catalog(&server.host())).await.unwrap_err();
        let no_catalog = matches!(
            error,
            Error::Denied { .. } | Error::NotFound { .. } | Error::Unsupported { .. }
        );
        assert!(no_catalog, "{status}: {error}");
    }
}

#[tokio::test]
async fn an_answer_that_is_no_list_is_malformed() {
    for body in ["", "[]", "<html>", r#"{"tags":7}"#, r#"{"tags":[1]}"#] {
        let server = Server::start(move |_| Reply::new(200).body(body)).await;
        let got = tags(&server).await;
        assert!(matches!(got, Err(Error::Malformed { .. })), "{body}: {got:?}");
    }
}
