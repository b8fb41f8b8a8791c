//! Pages of lists, with the original's tokens: base64url of two little-endian 16-bit numbers, limit and page.
//!
//! Ours: `?limit=N` asks for another page size, up to [`MAX_LIMIT`]; its tokens carry that limit.

/// The largest page a client may ask for.
pub(crate) const MAX_LIMIT: u16 = 10_000;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Which page of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) limit: u16,
    /// From 1.
    pub(crate) number: u16,
}

impl Page {
    /// The page that a query asks for; texts of errors as the original's.
    pub(crate) fn of(query: &[(String, String)], default_limit: u16) -> Result<Page, String> {
        let limit = match super::route::first(query, "limit") {
            None => default_limit,
            Some(text) => match text.parse() {
                Ok(limit @ 1..=MAX_LIMIT) => limit,
                _ => return Err(format!("limit must be a number from 1 to {MAX_LIMIT}")),
            },
        };
        let mut tokens = query.iter().filter(|(key, _)| key == "nextPageToken");
        let Some((_, token)) = tokens.next() else { return Ok(Page { limit, number: 1 }) };
        if tokens.next().is_some() {
            return Err("too many values for page token".to_owned());
        }
        let page = decode(token).ok_or_else(|| "page token is invalid".to_owned())?;
        if page.limit != limit {
            return Err(format!("token limit must be {limit}"));
        }
        if page.number == 0 {
            return Err("token page must be greater than zero".to_owned());
        }
        Ok(page)
    }

    /// The items of this page and the token of the next, if there is one.
    pub(crate) fn cut<T>(self, items: impl Iterator<Item = T>) -> (Vec<T>, String) {
        let skip = usize::from(self.limit) * (usize::from(self.number) - 1);
        let mut rest = items.skip(skip);
        let page: Vec<T> = rest.by_ref().take(usize::from(self.limit)).collect();
        let next = match (rest.next(), self.number.checked_add(1)) {
            (Some(_), Some(number)) => encode(Page { number, ..self }),
            _ => String::new(),
        };
        (page, next)
    }
}

fn encode(page: Page) -> String {
    let [a, b] = page.limit.to_le_bytes();
    let [c, d] = page.number.to_le_bytes();
    let digit = |bits: u32| char::from(ALPHABET[(bits & 63) as usize]);
    let first = u32::from_be_bytes([0, a, b, c]);
    let second = u32::from(d) << 16;
    let mut text: String = [18, 12, 6, 0].map(|shift| digit(first >> shift)).into_iter().collect();
    text.extend([digit(second >> 18), digit(second >> 12), '=', '=']);
    text
}

fn decode(token: &str) -> Option<Page> {
    let bytes: [u8; 8] = token.as_bytes().try_into().ok()?;
    let value = |byte: u8| ALPHABET.iter().position(|b| *b == byte).and_then(|at| u32::try_from(at).ok());
    if bytes[6..] != *b"==" {
        return None;
    }
    let mut bits = 0_u64;
    for byte in &bytes[..6] {
        bits = bits << 6 | u64::from(value(*byte)?);
    }
    let [.., a, b, c, d] = (bits >> 4).to_be_bytes();
    Some(Page { limit: u16::from_le_bytes([a, b]), number: u16::from_le_bytes([c, d]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_the_originals() {
        // limit 100, page 2: 64 00 02 00
        assert_eq!(encode(Page { limit: 100, number: 2 }), "ZAACAA==");
        for page in [Page { limit: 100, number: 2 }, Page { limit: 10_000, number: 65_535 }] {
            assert_eq!(decode(&encode(page)), Some(page));
        }
        assert_eq!(decode("rubbish"), None);
        assert_eq!(decode("????????"), None);
    }

    #[test]
    fn pages_cover_a_list_once() {
        let mut query = Vec::new();
        let mut all = Vec::new();
        loop {
            let page = Page::of(&query, 100).unwrap();
            let (items, next) = page.cut(0..250);
            all.extend(items);
            if next.is_empty() {
                break;
            }
            query = vec![("nextPageToken".to_owned(), next)];
        }
        assert_eq!(all, (0..250).collect::<Vec<_>>());
    }

    #[test]
    fn wrong_tokens_are_refused() {
        let ask = |pairs: &[(&str, &str)]| {
            let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            Page::of(&pairs, 100).unwrap_err()
        };
        assert_eq!(ask(&[("nextPageToken", "CgABAA==")]), "token limit must be 100");
        assert_eq!(ask(&[("nextPageToken", "ZAAAAA==")]), "token page must be greater than zero");
        assert_eq!(ask(&[("nextPageToken", "a"), ("nextPageToken", "b")]), "too many values for page token");
        assert!(ask(&[("limit", "0")]).contains("limit"));
    }
}
