//! The patterns of upstream's list of allowed settings: regular expressions, found anywhere in the text unless anchored
//! (plugins: plugins/meta/tuning/tuning.go `contains`). What such lists are written with: characters, `.`, `[a-z]`, `*`, `+`, `?`,
//! `^`, `$`, groups and alternatives. Anything else is refused, so that no line means something else than it says.

/// A pattern.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Pattern(Vec<Vec<Piece>>);

/// A thing and how often.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Piece {
    thing: Thing,
    least: usize,
    most: usize,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Thing {
    Char(char),
    Any,
    Class { negated: bool, ranges: Vec<(char, char)> },
    Start,
    End,
    Group(Vec<Vec<Piece>>),
}

impl Pattern {
    /// The pattern a text stands for, or what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut rest: &[char] = &text.chars().collect::<Vec<_>>();
        let pattern = alternatives(&mut rest)?;
        match rest.first() {
            None => Ok(Self(pattern)),
            Some(other) => Err(format!("a {other:?} that nothing opens")),
        }
    }

    /// Whether it is found in the text.
    pub(super) fn is_in(&self, text: &str) -> bool {
        let text: Vec<char> = text.chars().collect();
        (0..=text.len()).any(|at| any_of(&self.0, &text, at, &|_| true))
    }
}

fn alternatives(rest: &mut &[char]) -> Result<Vec<Vec<Piece>>, String> {
    let mut all = vec![sequence(rest)?];
    while let ['|', behind @ ..] = *rest {
        *rest = behind;
        all.push(sequence(rest)?);
    }
    Ok(all)
}

fn sequence(rest: &mut &[char]) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    while let [first, behind @ ..] = *rest {
        if matches!(first, '|' | ')') {
            break;
        }
        *rest = behind;
        let thing = thing(*first, rest)?;
        let (least, most) = match rest.first() {
            Some('*') => (0, usize::MAX),
            Some('+') => (1, usize::MAX),
            Some('?') => (0, 1),
            Some('{') => return Err("a count in braces".to_owned()),
            _ => (1, 1),
        };
        if (least, most) != (1, 1) {
            *rest = rest.get(1..).unwrap_or_default();
            if matches!(rest.first(), Some('*' | '+' | '?')) {
                return Err("a repetition of a repetition".to_owned());
            }
        }
        pieces.push(Piece { thing, least, most });
    }
    Ok(pieces)
}

fn thing(first: char, rest: &mut &[char]) -> Result<Thing, String> {
    Ok(match first {
        '.' => Thing::Any,
        '^' => Thing::Start,
        '$' => Thing::End,
        '[' => class(rest)?,
        '(' => {
            if rest.first() == Some(&'?') {
                match *rest {
                    ['?', ':', behind @ ..] => *rest = behind,
                    _ => return Err("a group with flags".to_owned()),
                }
            }
            let group = alternatives(rest)?;
            match *rest {
                [')', behind @ ..] => *rest = behind,
                _ => return Err("a group without an end".to_owned()),
            }
            Thing::Group(group)
        }
        '\\' => match *rest {
            [escaped, behind @ ..] if !escaped.is_ascii_alphanumeric() => {
                *rest = behind;
                Thing::Char(*escaped)
            }
            [escaped, ..] => return Err(format!("\\{escaped}")),
            [] => return Err("a backslash at the end".to_owned()),
        },
        '*' | '+' | '?' | '{' => return Err(format!("a {first:?} behind nothing")),
        other => Thing::Char(other),
    })
}

/// Behind the opening bracket.
fn class(rest: &mut &[char]) -> Result<Thing, String> {
    let negated = rest.first() == Some(&'^');
    if negated {
        *rest = rest.get(1..).unwrap_or_default();
    }
    let mut ranges = Vec::new();
    loop {
        match *rest {
            [']', behind @ ..] if !ranges.is_empty() => {
                *rest = behind;
                return Ok(Thing::Class { negated, ranges });
            }
            ['\\' | '[', ..] | [] => {
                return Err("a class that is not one of characters and ranges".to_owned());
            }
            [first, '-', last, behind @ ..] if *last != ']' => {
                ranges.push((*first, *last));
                *rest = behind;
            }
            [one, behind @ ..] => {
                ranges.push((*one, *one));
                *rest = behind;
            }
        }
    }
}

/// What has to hold of the place behind a match.
type Then<'a> = &'a dyn Fn(usize) -> bool;

fn any_of(alternatives: &[Vec<Piece>], text: &[char], at: usize, then: Then<'_>) -> bool {
    alternatives.iter().any(|pieces| all_of(pieces, text, at, then))
}

fn all_of(pieces: &[Piece], text: &[char], at: usize, then: Then<'_>) -> bool {
    match pieces {
        [] => then(at),
        [first, behind @ ..] => {
            repeated(&first.thing, (first.least, first.most), text, at, &|at| all_of(behind, text, at, then))
        }
    }
}

fn repeated(thing: &Thing, (least, most): (usize, usize), text: &[char], at: usize, then: Then<'_>) -> bool {
    let once_more = most > 0
        && one(thing, text, at, &|next| {
            // What matched nothing would do so for ever.
            (next > at || least > 0) && repeated(thing, (least.saturating_sub(1), most - 1), text, next, then)
        });
    once_more || (least == 0 && then(at))
}

fn one(thing: &Thing, text: &[char], at: usize, then: Then<'_>) -> bool {
    let here = text.get(at);
    match thing {
        Thing::Start => at == 0 && then(at),
        Thing::End => at == text.len() && then(at),
        Thing::Group(alternatives) => any_of(alternatives, text, at, then),
        Thing::Any => here.is_some() && then(at + 1),
        Thing::Char(wanted) => here == Some(wanted) && then(at + 1),
        Thing::Class { negated, ranges } => {
            let within =
                |c: &char| ranges.iter().any(|(first, last)| (first..=last).contains(&c)) != *negated;
            here.is_some_and(within) && then(at + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_settings_mean_what_they_say() {
        for (pattern, inside, outside) in [
            (
                "^net.ipv4.conf.IFNAME.accept_redirects$",
                "net.ipv4.conf.IFNAME.accept_redirects",
                "net.ipv4.conf.IFNAME.accept_redirects2",
            ),
            ("net.core.somaxconn", "x net.core.somaxconn y", "net.core.somaxcon"),
            (r"^net\.core\..*$", "net.core.a", "netxcore.a"),
            ("^net.(core|ipv4).[a-z_]+$", "net.ipv4.ip_forward", "net.ipv6.x"),
            (
                "^net.ipv4.conf.[^.]+.(?:rp_filter|arp_(ignore|notify))$",
                "net.ipv4.conf.eth0.arp_notify",
                "net.ipv4.conf.a.b.rp_filter",
            ),
            ("^a?b*c+$", "bbc", "aab"),
            ("^(a*)*b$", "aaaaaaaab", "aaaaaaaac"),
            ("^(a|)+$", "aa", "b"),
            ("^[0-9a-f-]+$", "12-af", "12_af"),
            ("", "anything", "\u{0}never"),
        ] {
            let parsed = Pattern::parse(pattern).unwrap();
            assert!(parsed.is_in(inside), "{pattern} {inside}");
            assert!(pattern.is_empty() || !parsed.is_in(outside), "{pattern} {outside}");
        }
    }

    #[test]
    fn what_is_not_served_is_refused() {
        for wrong in [r"\d+", "a{2}", "(a", "a)", "[a", "*a", "a**", "(?i)a", r"a\", r"[\w]", "[]"] {
            assert!(Pattern::parse(wrong).is_err(), "{wrong}");
        }
    }
}
