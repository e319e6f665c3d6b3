// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// fact is one observation, in words.
type fact struct {
	Of string `json:"of"`
	Is string `json:"is"`
}

// row is what came of a scenario. No facts: it was not run.
type row struct {
	Key      string        `json:"key"`
	Scenario string        `json:"scenario"`
	Facts    []fact        `json:"facts"`
	Took     time.Duration `json:"-"`
}

func (r *row) outcome() string {
	if len(r.Facts) == 0 {
		return errNotAsked.Error()
	}
	var out []string
	for _, f := range r.Facts {
		out = append(out, f.Of+": "+f.Is)
	}
	return strings.Join(out, "; ")
}

// fact is the value of one observation, "" where it was not made.
func (r *row) fact(of string) string {
	for _, f := range r.Facts {
		if f.Of == of {
			return f.Is
		}
	}
	return ""
}

func readRows(path string) ([]row, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the file
	}
	var rows []row
	if err := json.Unmarshal(text, &rows); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return rows, nil
}

// column is the outcomes of one pair of servers.
type column struct {
	title string
	rows  []row
}

// table is the outcomes side by side. What equals the column before says so.
func table(columns []column) string {
	var b strings.Builder
	b.WriteString("| Scenario |")
	for _, c := range columns {
		b.WriteString(" " + c.title + " |")
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, r := range columns[0].rows {
		b.WriteString("| " + r.Scenario + " |")
		var before *row
		for _, c := range columns {
			i := slices.IndexFunc(c.rows, func(other row) bool { return other.Key == r.Key })
			b.WriteString(" " + cell(before, c.rows, i) + " |")
			if i >= 0 {
				before = &c.rows[i]
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

// cell is the outcome rows[i] beside that of the column before: what differs from it.
func cell(before *row, rows []row, i int) string {
	switch {
	case i < 0:
		return errNotAsked.Error()
	case before == nil:
		return rows[i].outcome()
	}
	var other row
	for _, f := range rows[i].Facts {
		if before.fact(f.Of) != f.Is {
			other.Facts = append(other.Facts, f)
		}
	}
	for _, f := range before.Facts {
		if rows[i].fact(f.Of) == "" {
			other.Facts = append(other.Facts, fact{f.Of, "none"})
		}
	}
	switch {
	case len(rows[i].Facts) == 0:
		return rows[i].outcome()
	case len(other.Facts) == 0:
		return "the same"
	}
	return other.outcome()
}
