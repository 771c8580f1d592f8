//! Single keys and ranges of them.

use bytes::Bytes;
use oc_mesh::store::{MAX_VALUE_BYTES, Op, Page};

use super::fixture::{Fixture, committed, put_op};

fn keys(page: &Page) -> Vec<&str> {
    page.items.iter().map(|entry| entry.key.as_str()).collect()
}

pub async fn a_key_is_absent_until_it_is_written(fixture: Fixture) {
    assert_eq!(fixture.store.get("a/1").await.unwrap(), None);
    assert_eq!(fixture.store.get("").await.unwrap(), None);
    fixture.put("a/1", "one").await;
    assert_eq!(fixture.get("a/1").await.as_deref(), Some("one"));
    fixture.put("a/1", "").await;
    assert_eq!(fixture.get("a/1").await.as_deref(), Some(""), "an empty value is a value");
    fixture.delete("a/1").await;
    assert_eq!(fixture.get("a/1").await, None);
    fixture.put("a/1", "again").await;
    assert_eq!(fixture.get("a/1").await.as_deref(), Some("again"));
}

pub async fn every_change_has_a_higher_revision(fixture: Fixture) {
    let first = fixture.put("a", "1").await;
    let second = fixture.put("b", "1").await;
    let third = fixture.put("a", "2").await;
    let fourth = fixture.delete("b").await;
    assert!(first < second && second < third && third < fourth);
    assert_eq!(fixture.store.get("a").await.unwrap().unwrap().mod_revision, third);
    assert_eq!(fixture.revision().await, fourth);
    let again = fixture.open_again().await;
    assert_eq!(again.range("a", None, 1).await.unwrap().revision, fourth);
}

pub async fn a_range_comes_in_pages(fixture: Fixture) {
    for number in 0..10 {
        fixture.put(&format!("list/{number}"), "").await;
    }
    let range = |after, limit| fixture.store.range("list/", after, limit);
    let page = range(None, 4).await.unwrap();
    assert_eq!(keys(&page), ["list/0", "list/1", "list/2", "list/3"]);
    assert!(page.more);
    let page = range(Some("list/3"), 6).await.unwrap();
    assert_eq!(keys(&page), ["list/4", "list/5", "list/6", "list/7", "list/8", "list/9"]);
    assert!(!page.more, "a page that is full to the end has none after it");
    let page = range(Some("list/35"), 1).await.unwrap();
    assert_eq!(keys(&page), ["list/4"], "`after` need not exist");
    assert!(page.more);
    assert!(range(Some("list/9"), 5).await.unwrap().items.is_empty());
    assert!(range(Some("m"), 5).await.unwrap().items.is_empty(), "after the whole range");
    assert_eq!(range(Some("a"), 20).await.unwrap().items.len(), 10, "before the whole range");
    let page = range(None, 0).await.unwrap();
    assert!(page.items.is_empty() && page.more);
    assert!(!fixture.store.range("none/", None, 0).await.unwrap().more);
}

pub async fn a_range_holds_its_prefix_and_nothing_beside_it(fixture: Fixture) {
    // Neighbours in byte order, some around bytes where the end of a prefix is no valid UTF-8.
    let all = [
        "a",
        "a.",
        "a/",
        "a/0",
        "a/\u{7f}",
        "a/\u{80}",
        "a0",
        "p\u{7f}",
        "p\u{7f}x",
        "p\u{80}",
        "ÿ",
        "ÿx",
        "Ā",
        "\u{ffff}",
        "\u{ffff}y",
        "\u{10000}",
        "\u{10ffff}",
        "\u{10ffff}z",
    ];
    for key in all {
        fixture.put(key, "").await;
    }
    for prefix in ["a", "a/", "a0", "p\u{7f}", "ÿ", "Ā", "\u{ffff}", "\u{10000}", "\u{10ffff}", "", "q"] {
        let mut expected: Vec<&str> = all.into_iter().filter(|key| key.starts_with(prefix)).collect();
        expected.sort_unstable();
        let page = fixture.store.range(prefix, None, 100).await.unwrap();
        assert_eq!(keys(&page), expected, "{prefix:?}");
    }
}

pub async fn odd_keys_and_values_survive(fixture: Fixture) {
    let keys = ["\0", "a\0b", "a\0", "%_*?[]", "a'b\"c\\", " ", "\n", "🦀/ключ", "a\u{7f}"];
    for key in keys {
        committed(fixture.txn(vec![], vec![put_op(key, key)]).await);
    }
    for key in keys {
        assert_eq!(fixture.get(key).await.as_deref(), Some(key), "{key:?}");
    }
    let page = fixture.store.range("a\0", Some("a\0"), 10).await.unwrap();
    assert_eq!(page.items.len(), 1);
    assert_eq!(page.items[0].key, "a\0b");

    let value: Bytes = (0..=255u8).cycle().take(4096).collect::<Vec<_>>().into();
    let put = Op::Put { key: "bytes".into(), value: value.clone(), lease: None };
    committed(fixture.txn(vec![], vec![put]).await);
    assert_eq!(fixture.store.get("bytes").await.unwrap().unwrap().value, value);
}

pub async fn large_pages_are_cut_short_rather_than_refused(fixture: Fixture) {
    let value: Bytes = vec![7; MAX_VALUE_BYTES].into();
    for number in 0..24 {
        let put = Op::Put { key: format!("big/{number:02}"), value: value.clone(), lease: None };
        committed(fixture.txn(vec![], vec![put]).await);
    }
    let mut found = Vec::new();
    loop {
        let after = found.last().cloned();
        let page = fixture.store.range("big/", after.as_deref(), 500).await.unwrap();
        assert!(!page.items.is_empty());
        found.extend(page.items.into_iter().map(|entry| entry.key));
        if !page.more {
            break;
        }
    }
    assert_eq!(found, (0..24).map(|number| format!("big/{number:02}")).collect::<Vec<_>>());
}
