// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"reflect"
)

// Parameters is a part of a file, kept as it stands together with its place: one plugin's parameter block, decoded by
// the plugin's own constructor. The zero Parameters is an absent block. Immutable.
type Parameters struct {
	file, path string
	root       *node
}

// Parse reads any YAML or JSON file of at most [MaxFileBytes] as Parameters, with the bounds of [Load]: duplicate
// keys, deep nesting and alias bombs are errors. A field of type Parameters (or a slice of them) keeps its part raw.
func Parse(file string, data []byte) (Parameters, error) {
	root, problems := parse(file, data)
	if len(problems) > 0 {
		return Parameters{}, joined(problems)
	}
	return Parameters{file: file, root: root}, nil
}

// Absent reports whether there is nothing to decode.
func (p Parameters) Absent() bool { return p.root == nil || p.root.kind == kindNull }

// Line is where the block begins in its file, 0 when it is absent.
func (p Parameters) Line() int {
	if p.root == nil {
		return 0
	}
	return p.root.line
}

// Decode writes the block strictly over out, a pointer to a value that holds the defaults; absent leaves it as it is.
// Keys are the names in yaml tags, else in json tags, else the Go name with a small first letter. Durations are Go
// duration strings; an int64 tagged `yaml:"name,quantity"` takes Kubernetes quantities. Unknown keys and values that
// do not fit are errors. The error joins all problems, each with file, line and path.
func (p Parameters) Decode(out any) error {
	v := reflect.ValueOf(out)
	if v.Kind() != reflect.Pointer || v.IsNil() {
		return errors.New("decode parameters: out must be a pointer")
	}
	if p.root == nil {
		return nil
	}
	d := &decoder{file: p.file, lines: map[string]int{}}
	d.decode(p.root, v.Elem(), p.path, "")
	return joined(d.problems)
}

// Errorf is an error about the value at path below the block ("weights[0].value", or "" for the block itself), with
// file, line and full path as those of Decode: for the range checks of a plugin's constructor.
func (p Parameters) Errorf(path, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	full := p.path
	if path != "" && path[0] != '[' && full != "" {
		full += "."
	}
	full += path
	if p.root == nil {
		return fmt.Errorf("%s: %s", full, text)
	}
	lines := map[string]int{p.path: p.root.line}
	collect(p.root, p.path, lines)
	return &problem{file: p.file, line: nearest(lines, full), path: full, text: text}
}

// collect records the line of every value below n.
func collect(n *node, path string, lines map[string]int) {
	for i, item := range n.items {
		below, line := fmt.Sprintf("%s[%d]", path, i), item.line
		if n.kind == kindMapping {
			below, line = join(path, n.keys[i].name), n.keys[i].line
		}
		lines[below] = line
		collect(item, below, lines)
	}
}

// nearest is the line of path, or of the closest part above it that has one.
func nearest(lines map[string]int, path string) int {
	for {
		if line := lines[path]; line > 0 {
			return line
		}
		cut := len(path) - 1
		for cut > 0 && path[cut] != '.' && path[cut] != '[' {
			cut--
		}
		if cut <= 0 {
			return max(1, lines[""])
		}
		path = path[:cut]
	}
}
