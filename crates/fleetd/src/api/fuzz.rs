//! For fuzzing: requests of the API as any bytes.

use super::page::Page;
use super::route::{self, Route};
use super::{access, decode, members, resources, users};
use hyper::{Method, Uri};

/// A request: `METHOD PATH?QUERY`, a newline, and the body. It is read as far as that is possible without a server. Returns
/// what came of it, in words.
///
/// # Panics
/// When a check fails.
pub fn request(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (line, body) = (&bytes[..end], bytes.get(end + 1..).unwrap_or_default());
    let mut words = line.split(|byte| *byte == b' ');
    let method = Method::from_bytes(words.next().unwrap_or_default());
    let uri =
        std::str::from_utf8(words.next().unwrap_or_default()).ok().and_then(|uri| uri.parse::<Uri>().ok());
    let (Ok(method), Some(uri)) = (method, uri) else { return "no request".to_owned() };
    let route = route::route(&method, uri.path());
    let query = route::query(uri.query());
    let page = match Page::of(&query, 100) {
        Ok(page) => {
            let (items, next) = page.cut(0..usize::from(page.limit) * usize::from(page.number) + 1);
            assert_eq!(items.len(), usize::from(page.limit));
            if !next.is_empty() {
                let again =
                    [("nextPageToken".to_owned(), next), ("limit".to_owned(), page.limit.to_string())];
                let again = Page::of(&again, 100).map(|next| (next.limit, next.number));
                assert_eq!(again, Ok((page.limit, page.number + 1)), "the next page");
            }
            "a page".to_owned()
        }
        Err(error) => error,
    };
    let role = format!("{:?}", access::needs(&route));
    let read = match route {
        Route::PutUnit(_) => decode::unit(body).and_then(|unit| {
            let file = resources::read_file(unit.options, &unit.file)?;
            Ok(file.map_or("no file".to_owned(), |file| format!("a file, {}", file.options().len() > 1)))
        }),
        Route::PatchMachines => decode::metadata_edits(body).map(|edits| {
            let good = |text: &str| !text.is_empty() && text.len() <= 4096;
            assert!(edits.iter().all(|(_, key, value)| good(key) && value.as_deref().is_none_or(good)));
            format!("{} edits", edits.len().min(3))
        }),
        Route::CreateJoinToken => members::read_terms(body).map(|_| "terms".to_owned()),
        Route::CreateUser => users::read_new(body).map(|_| "a user".to_owned()),
        Route::SetRole(_) => users::read_role(body).map(|role| role.to_string()),
        Route::Refused(status, message) => Ok(format!("{status} {message}")),
        other => {
            let name = format!("{other:?}");
            Ok(name.split('(').next().unwrap_or_default().to_owned())
        }
    };
    let read = read.unwrap_or_else(|error| {
        assert!(!error.is_empty());
        error
    });
    format!("{page} {role} {read}")
}
