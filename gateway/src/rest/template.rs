//! Path templates of `google.api.http`, such as `/api/sandboxes/{sandbox_id}/files`.
//!
//! Grammar (google/api/http.proto): literals, `*`, `{field}`, `{field=*}`, and `{field=**}` at the end, which
//! takes the rest of the path. Nested patterns (`{name=shelves/*}`), dotted fields and `:verb` suffixes are not
//! used by the contract; a template with one is refused at start.

/// One parsed template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathTemplate {
    /// As `matchit` wants it. Parameters are named by their place, because two routes may share a prefix and
    /// call the same place by different names.
    pub pattern: String,
    /// The fields that the places fill, in order; `None` for a place that fills none.
    pub fields: Vec<Option<String>>,
}

impl PathTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// What the template holds that cannot be served.
    pub fn parse(template: &str) -> Result<Self, String> {
        let path = template.strip_prefix('/').ok_or("a path template begins with `/`")?;
        let segments: Vec<&str> = path.split('/').collect();
        let mut pattern = String::new();
        let mut fields = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            let place = fields.len();
            pattern.push('/');
            match Segment::parse(segment)? {
                Segment::Literal(literal) => pattern.push_str(literal),
                Segment::One(field) => {
                    pattern.push_str(&format!("{{p{place}}}"));
                    fields.push(field.map(str::to_owned));
                }
                Segment::Rest(field) if index + 1 == segments.len() => {
                    pattern.push_str(&format!("{{*p{place}}}"));
                    fields.push(field.map(str::to_owned));
                }
                Segment::Rest(_) => return Err(format!("`{segment}` must come last")),
            }
        }
        Ok(Self { pattern, fields })
    }
}

enum Segment<'a> {
    Literal(&'a str),
    One(Option<&'a str>),
    Rest(Option<&'a str>),
}

impl<'a> Segment<'a> {
    fn parse(segment: &'a str) -> Result<Self, String> {
        match segment {
            "*" => return Ok(Self::One(None)),
            "**" => return Ok(Self::Rest(None)),
            _ => {}
        }
        if let Some(variable) = segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            let (field, pattern) = variable.split_once('=').unwrap_or((variable, "*"));
            if field.is_empty() || !field.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                return Err(format!("`{field}` is no field of the request"));
            }
            return match pattern {
                "*" => Ok(Self::One(Some(field))),
                "**" => Ok(Self::Rest(Some(field))),
                _ => Err(format!("pattern `{pattern}` of `{field}`")),
            };
        }
        if segment.is_empty() || segment.contains(['{', '}', '*', ':', '=']) {
            return Err(format!("segment `{segment}`"));
        }
        Ok(Self::Literal(segment))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn places_are_numbered_and_remember_their_fields() {
        let template =
            PathTemplate::parse("/api/sandboxes/{sandbox_id}/exec/{exec_id=*}/*/{rest=**}").unwrap();
        assert_eq!(template.pattern, "/api/sandboxes/{p0}/exec/{p1}/{p2}/{*p3}");
        assert_eq!(
            template.fields,
            [Some("sandbox_id".to_owned()), Some("exec_id".to_owned()), None, Some("rest".to_owned())]
        );
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        for template in
            ["", "api", "/", "/a//b", "/{}", "/{a.b}", "/{a=b/*}", "/**/a", "/a:cancel", "/{a", "/a}"]
        {
            assert!(PathTemplate::parse(template).is_err(), "{template}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "[/{}*=:.a-z0-9_]{0,40}") {
            if let Ok(template) = PathTemplate::parse(&text) {
                let mut router = matchit::Router::new();
                prop_assert!(router.insert(template.pattern, ()).is_ok());
            }
        }
    }
}
