//! Tables as the original prints them: Go's tabwriter with cells padded by tabs, a tab being 8
//! columns wide and at least one of them free (golden/03-list-machines.txt, "white space").

/// Width of a tab.
const TAB: usize = 8;

/// Lays out lines of cells. The last cell of a line is not padded. Every character counts as one
/// column, wide ones too, as in the original.
pub(crate) fn layout(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(|line| line.len().saturating_sub(1)).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = lines.iter().filter(|line| line.len() > column + 1);
            let widest = cells.map(|line| width(&line[column])).max().unwrap_or(0);
            (widest + 1).next_multiple_of(TAB)
        })
        .collect();
    let mut text = String::new();
    for line in lines {
        for (column, cell) in line.iter().enumerate() {
            text.extend(clean(cell));
            if column + 1 < line.len() {
                let free = widths[column] - width(cell);
                text.extend(std::iter::repeat_n('\t', free.div_ceil(TAB)));
            }
        }
        text.push('\n');
    }
    text
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

/// A cell may hold text that others wrote (descriptions, metadata): it must not break the table or
/// steer the terminal.
fn clean(cell: &str) -> impl Iterator<Item = char> + '_ {
    cell.chars().map(|c| if c.is_control() { ' ' } else { c })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> String {
        layout(&text.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect::<Vec<_>>())
    }

    /// golden/03-list-machines.txt
    #[test]
    fn machines() {
        assert_eq!(
            table(
                "MACHINE|IP|METADATA\n4a1e0c2f...|172.30.7.11|disk=ssd,region=eu\nc93b5f08...|172.30.7.13|-"
            ),
            "MACHINE\t\tIP\t\tMETADATA\n4a1e0c2f...\t172.30.7.11\tdisk=ssd,region=eu\nc93b5f08...\t172.30.7.13\t-\n"
        );
        assert_eq!(
            table(
                "METADATA|IP|MACHINE\ndisk=ssd,region=eu|172.30.7.11|4a1e0c2f...\n-|172.30.7.13|c93b5f08..."
            ),
            "METADATA\t\tIP\t\tMACHINE\ndisk=ssd,region=eu\t172.30.7.11\t4a1e0c2f...\n-\t\t\t172.30.7.13\tc93b5f08...\n"
        );
    }

    /// golden/05-unit-text.txt
    #[test]
    fn unit_files() {
        assert_eq!(
            table(
                "UNIT|HASH|DSTATE|STATE|TARGET\nempty-value.service|2dcfcf4|inactive|inactive|-\nbom.service|86943ac|inactive|inactive|-"
            ),
            "UNIT\t\t\tHASH\tDSTATE\t\tSTATE\t\tTARGET\nempty-value.service\t2dcfcf4\tinactive\tinactive\t-\nbom.service\t\t86943ac\tinactive\tinactive\t-\n"
        );
        assert_eq!(
            table("DESC|UNIT\n-|bom.service\nWith comments|comments.service\nGrüße ☃|unicode.service"),
            "DESC\t\tUNIT\n-\t\tbom.service\nWith comments\tcomments.service\nGrüße ☃\t\tunicode.service\n"
        );
    }

    /// golden/08-list-units.txt
    #[test]
    fn only_the_legend() {
        assert_eq!(table("UNIT|MACHINE|ACTIVE|SUB"), "UNIT\tMACHINE\tACTIVE\tSUB\n");
        assert_eq!(table("MACHINE"), "MACHINE\n");
        assert_eq!(layout(&[]), "");
    }

    #[test]
    fn control_characters_do_not_pass() {
        assert_eq!(table("a\u{1b}[31m\tb|c"), "a [31m b\tc\n");
    }
}
