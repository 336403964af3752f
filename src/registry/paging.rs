//! Lists that come in pages: the tags of a repository, the repositories of a registry. The registry says where the
//! next page is (`Link`), or takes the last name of the one before; both can be made to go on for ever, so both end
//! here.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use reqwest::header::{ACCEPT, HeaderMap, HeaderValue, LINK};
use reqwest::{Method, Url};
use serde::Deserialize;

use super::answer::ErrorBody;
use super::endpoint::{Endpoint, Need, Route};
use super::host::Kind;
use super::reference::{Repository, is_tag};
use super::request::{Core, Reached, Request, Target, pull_scope};
use super::retry::{Attempts, Patience};
use super::secret::redact;
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Names asked for in one page; registries cap it, and some refuse more than theirs.
const PAGE_NAMES: u32 = 1000;
/// A page is at most so long: a registry may send everything in one.
const PAGE_BYTES_MAX: u64 = 32 << 20;
/// Pages of one list.
const PAGES_MAX: usize = 20_000;
/// Names of one list.
const NAMES_MAX: usize = 1_000_000;
/// Pages in a row without any name; some registries filter a page after cutting it.
const EMPTY_PAGES_MAX: u32 = 32;

/// A list that is being read page by page.
pub struct Pager {
    core: Arc<Core>,
    registry: String,
    /// Whom the pages come from; `None` before the first.
    route: Option<Route>,
    list: List,
    what: String,
    next: Next,
    page_names: u32,
    seen: HashSet<Digest>,
    previous: Vec<String>,
    names: usize,
    empty_pages: u32,
    with_credentials: bool,
}

enum List {
    Tags(Repository),
    Catalog,
}

enum Next {
    First,
    Link(Url),
    After(String),
    End,
}

#[derive(Deserialize)]
struct Page {
    #[serde(alias = "tags", alias = "repositories")]
    names: Option<Vec<String>>,
}

impl fmt::Debug for Pager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pager")
            .field("list", &self.what)
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

impl Pager {
    pub(super) fn tags(core: &Arc<Core>, repository: &Repository) -> Self {
        let what = format!("{repository}: tags");
        Self::new(core, repository.host(), List::Tags(repository.clone()), what)
    }

    pub(super) fn catalog(core: &Arc<Core>, host: &str) -> Self {
        let what = format!("{host}: catalog");
        Self::new(core, host, List::Catalog, what)
    }

    fn new(core: &Arc<Core>, registry: &str, list: List, what: String) -> Self {
        Self {
            core: Arc::clone(core),
            registry: registry.to_owned(),
            route: None,
            list,
            what,
            next: Next::First,
            page_names: PAGE_NAMES,
            seen: HashSet::new(),
            previous: Vec::new(),
            names: 0,
            empty_pages: 0,
            with_credentials: false,
        }
    }

    #[must_use]
    pub fn with_credentials(&self) -> bool {
        self.with_credentials
    }

    /// The names of the next page, `None` after the last. If the mirror that gave the first pages fails, the list begins
    /// anew at the next endpoint, so a name may come twice. Names that break the grammar of references are left out:
    /// nothing could be asked for by them.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Denied`] or [`Error::Unsupported`] if there is no such list or it is not for
    /// us; [`Error::Malformed`] for a list that never ends or leads elsewhere; those of the network.
    pub async fn next_page(&mut self) -> Result<Option<Vec<String>>> {
        while !matches!(self.next, Next::End) {
            let Some((reached, names)) = self.fetch_on().await? else {
                continue;
            };
            let received = names.len();
            let advanced = self.advance(&reached, &names);
            drop(reached);
            if let Err(error) = advanced {
                self.pass(error)?;
                continue;
            }
            let repeated = received > 0 && names == self.previous;
            self.previous = names;
            if repeated {
                // A registry that ignores `last` has sent everything in the first page.
                self.next = Next::End;
                return Ok(None);
            }
            let names: Vec<String> = self
                .previous
                .iter()
                .filter(|name| self.list.is_name(&self.registry, name))
                .cloned()
                .collect();
            if names.is_empty() {
                self.count_empty()?;
                continue;
            }
            self.empty_pages = 0;
            return Ok(Some(names));
        }
        Ok(None)
    }

    /// One page from whom the list comes from, or the first one from the next endpoint if that fails; `None` if the
    /// registry wants a smaller one to be asked for.
    async fn fetch_on(&mut self) -> Result<Option<(Reached, Vec<String>)>> {
        let mut attempts = self.core.begin(&self.what, Patience::Total)?;
        let mut route = match self.route.take() {
            Some(route) => route,
            None => {
                let need = match self.list {
                    List::Tags(_) => Need::Resolve,
                    List::Catalog => Need::Server,
                };
                self.core.route(&self.what, &self.registry, need).await?
            }
        };
        loop {
            let endpoint = route.current()?;
            let mut bounded = route.bounded(&attempts);
            let attempts = bounded.as_mut().unwrap_or(&mut attempts);
            match self.fetch(&endpoint, attempts).await {
                Ok(page) => {
                    self.route = Some(route);
                    return Ok(page);
                }
                Err(error) => route.pass(error)?,
            }
            self.begin_anew();
        }
    }

    /// The list turned out to be wrong: begins it anew at the next endpoint, if there is one.
    fn pass(&mut self, error: Error) -> Result<()> {
        match &mut self.route {
            Some(route) => route.pass(error)?,
            None => return Err(error),
        }
        self.begin_anew();
        Ok(())
    }

    fn begin_anew(&mut self) {
        self.next = Next::First;
        self.page_names = PAGE_NAMES;
        self.previous.clear();
        self.seen.clear();
        self.names = 0;
        self.empty_pages = 0;
    }

    async fn fetch(
        &mut self,
        endpoint: &Endpoint,
        attempts: &mut Attempts,
    ) -> Result<Option<(Reached, Vec<String>)>> {
        let request = self.request();
        let (mut reached, body) = self
            .core
            .whole(endpoint, &request, PAGE_BYTES_MAX, attempts)
            .await?;
        let status = reached.answer.status().as_u16();
        if status == 400 && self.page_names > 0 {
            let error = ErrorBody::read(&mut reached.answer).await;
            if error.has(&["PAGINATION_NUMBER_INVALID"]) {
                // At last no number at all is sent, which is 0 here.
                self.page_names /= 10;
                return Ok(None);
            }
            return Err(error.meaning(&self.what, &reached.answer, "no other page size helps"));
        }
        if !reached.answer.status().is_success() {
            return Err(self.core.refuse(&endpoint.host, &self.what, &mut reached).await);
        }
        self.with_credentials |= reached.with_credentials;
        let names = names(&self.what, &body)?;
        self.names += names.len();
        if self.names > NAMES_MAX {
            let why = format!("more than {NAMES_MAX} names");
            return Err(Error::unsupported(&self.what, why));
        }
        Ok(Some((reached, names)))
    }

    fn request(&self) -> Request {
        let (path, scope, kind) = match &self.list {
            List::Tags(repository) => (
                format!("/{}/tags/list", repository.path()),
                pull_scope(repository),
                Kind::Tags,
            ),
            List::Catalog => (
                "/_catalog".to_owned(),
                "registry:catalog:*".to_owned(),
                Kind::Catalog,
            ),
        };
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        if self.page_names > 0 {
            query.append_pair("n", &self.page_names.to_string());
        }
        if let Next::After(last) = &self.next {
            query.append_pair("last", last);
        }
        let query = query.finish();
        let to = match &self.next {
            Next::Link(url) => Target::Page(url.clone()),
            _ if query.is_empty() => Target::Path(path),
            _ => Target::Path(format!("{path}?{query}")),
        };
        Request {
            method: Method::GET,
            to,
            headers: HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("application/json"))]),
            scope,
            kind,
        }
    }

    /// Decides where the next page is.
    fn advance(&mut self, reached: &Reached, names: &[String]) -> Result<()> {
        let links = reached.answer.headers().get_all(LINK);
        let link = links
            .iter()
            .filter_map(|value| value.to_str().ok())
            .find_map(next_link);
        let cursor = match link {
            Some(link) => {
                let url = reached.answer.url().join(link).ok();
                let same_origin = url.filter(|url| url.origin() == reached.answer.url().origin());
                let url = same_origin.ok_or_else(|| {
                    let shown = Url::parse(link).map_or_else(|_| "no URL".to_owned(), |url| redact(&url));
                    let why = format!("the next page is not at the registry: {shown}");
                    Error::malformed(&self.what, why)
                })?;
                let cursor = url.to_string();
                self.next = Next::Link(url);
                cursor
            }
            // Without a link a full page may have a successor. More than asked for means that the size is ignored.
            None => match names.last() {
                Some(last) if self.page_names > 0 && names.len() == self.page_names as usize => {
                    self.next = Next::After(last.clone());
                    format!(" {last}")
                }
                _ => {
                    self.next = Next::End;
                    return Ok(());
                }
            },
        };
        let endless = |why: &str| Err(Error::malformed(&self.what, why));
        if !self.seen.insert(Digest::of(cursor.as_bytes())) && names != self.previous {
            return endless("its pages lead in a circle");
        }
        if self.seen.len() > PAGES_MAX {
            return endless("its pages do not end");
        }
        Ok(())
    }

    fn count_empty(&mut self) -> Result<()> {
        self.empty_pages += 1;
        match self.empty_pages > EMPTY_PAGES_MAX {
            true => Err(Error::malformed(&self.what, "its pages are empty and do not end")),
            false => Ok(()),
        }
    }
}

impl List {
    fn is_name(&self, registry: &str, name: &str) -> bool {
        match self {
            Self::Tags(_) => is_tag(name),
            Self::Catalog => Repository::new(registry, name).is_ok(),
        }
    }
}

/// The names in a page.
pub(super) fn names(what: &str, body: &[u8]) -> Result<Vec<String>> {
    let page: Page = serde_json::from_slice(body)
        .map_err(|_| Error::malformed(what, "the registry's answer is no list of names"))?;
    Ok(page.names.unwrap_or_default())
}

/// The target of the `rel="next"` link in a Link header (RFC 8288).
pub(super) fn next_link(header: &str) -> Option<&str> {
    let mut rest = header;
    while let Some((_, after)) = rest.split_once('<') {
        let (target, after) = after.split_once('>')?;
        let parameters = after
            .split_once(", <")
            .map_or(after, |(parameters, _)| parameters);
        let parameters = parameters.split_once(",<").map_or(parameters, |(own, _)| own);
        let is_next = parameters.split(';').any(|parameter| {
            let Some((name, value)) = parameter.split_once('=') else {
                return false;
            };
            let value = value.trim().trim_end_matches(',').trim_matches('"');
            let mut relations = value.split_ascii_whitespace();
            name.trim().eq_ignore_ascii_case("rel") && relations.any(|rel| rel.eq_ignore_ascii_case("next"))
        });
        if is_next {
            return Some(target);
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn links_as_registries_write_them() {
        let next = Some("/v2/_catalog?last=b&n=2");
        for header in [
            r#"</v2/_catalog?last=b&n=2>; rel="next""#,
            r#"</v2/_catalog?last=b&n=2>;rel=next"#,
            r#"</first>; rel="first", </v2/_catalog?last=b&n=2>; title="x"; rel="next""#,
            r#"</first>;rel=first,</v2/_catalog?last=b&n=2>;REL="last next""#,
        ] {
            assert_eq!(next_link(header), next, "{header}");
        }
        for header in ["", "<", "<x", r#"<x>; rel="prev""#, r#"<x>; title="next""#, "<x>"] {
            assert_eq!(next_link(header), None, "{header}");
        }
    }

    proptest! {
        #[test]
        fn any_link_is_survived(header in "[<>;,=\" a-z]{0,60}") {
            let _ = next_link(&header);
        }
    }
}
