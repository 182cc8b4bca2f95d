//! Pages of lists.

use berth_api::manager::{PAGE_LIMIT_DEFAULT, PAGE_LIMIT_MAX, Page};
use berth_model::Problem;

/// Cuts a page out of items that are in order of `key`, which must be unique; the cursor is the last item's key.
///
/// # Errors
/// When the limit is 0 or above [`PAGE_LIMIT_MAX`].
pub fn page<I, T>(
    items: impl IntoIterator<Item = I>,
    limit: Option<u32>,
    cursor: Option<&str>,
    key: impl Fn(&I) -> String,
    show: impl Fn(I) -> T,
) -> Result<Page<T>, Problem> {
    let limit = limit.unwrap_or(PAGE_LIMIT_DEFAULT);
    if limit == 0 || limit > PAGE_LIMIT_MAX {
        return Err(Problem::field("limit", limit, format!("1 to {PAGE_LIMIT_MAX}")));
    }
    let mut rest =
        items.into_iter().skip_while(|item| cursor.is_some_and(|cursor| key(item).as_str() <= cursor));
    let mut page = Page { items: Vec::new(), next_cursor: None };
    let mut last = None;
    for _ in 0..limit {
        let Some(item) = rest.next() else { return Ok(page) };
        last = Some(key(&item));
        page.items.push(show(item));
    }
    if rest.next().is_some() {
        page.next_cursor = last;
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_put_together_are_the_list() {
        let all: Vec<String> = (0..23).map(|number| format!("{number:03}")).collect();
        let (mut seen, mut cursor) = (Vec::new(), None::<String>);
        loop {
            let part = page(all.iter(), Some(5), cursor.as_deref(), |item| (*item).clone(), String::clone)
                .expect("a page");
            seen.extend(part.items);
            match part.next_cursor {
                Some(next) => cursor = Some(next),
                None => break,
            }
        }
        assert_eq!(seen, all);
    }

    #[test]
    fn a_cursor_whose_item_is_gone_goes_on_behind_it() {
        let part = page(["a", "c", "d"], Some(1), Some("b"), |item| (*item).to_owned(), str::to_owned)
            .expect("page");
        assert_eq!((part.items, part.next_cursor), (vec!["c".to_owned()], Some("c".to_owned())));
        assert!(page(["a"], Some(0), None, |item| (*item).to_owned(), str::to_owned).is_err());
    }
}
