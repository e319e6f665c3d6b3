// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
)

// Bounds of a file, so that a hostile one costs little. Far above what a configuration or an endpoints file needs.
const (
	// MaxFileBytes is the largest file that is read (llm-d's bound for file-discovery, used for all files).
	MaxFileBytes = 1 << 20
	// maxNodes bounds the values of a file after aliases are expanded.
	maxNodes = 500_000
	// maxDepth bounds nesting: the parser recurses.
	maxDepth = 64
	// maxIndent bounds indentation in columns, and with it block nesting.
	maxIndent = 256
	// maxMarks bounds tags, anchors, aliases and explicit keys, over which the parser recurses too.
	maxMarks = 1000
	// The YAML parser's time grows with the square of the keys of a mapping, the items of a list, the bytes of a line and the
	// empty lines of a block of text.
	maxKeys  = 2_000
	maxItems = 20_000
	maxLine  = 16 << 10
	maxBlank = 1_000
	// maxProblems bounds how many problems of one file are told.
	maxProblems = 100
)

// kind says what a node holds.
type kind uint8

const (
	kindNull kind = iota
	kindScalar
	kindList
	kindMapping
)

func (k kind) String() string {
	return [...]string{"null", "a single value", "a list", "a mapping"}[k]
}

// node is one value of a file with aliases and merge keys resolved. Immutable; aliases share nodes.
type node struct {
	kind  kind
	line  int     // 1-based
	value any     // scalars: string, bool, int64, uint64, float64
	keys  []key   // mappings, in file order
	items []*node // values of keys, or the items of a list
	size  int     // nodes below and including this one, aliases expanded
}

type key struct {
	name string
	line int
}

// problem is one mistake of a file.
type problem struct {
	file, path, text string
	line             int
}

func (p *problem) Error() string {
	if p.path == "" {
		return fmt.Sprintf("%s:%d: %s", p.file, p.line, p.text)
	}
	return fmt.Sprintf("%s:%d: %s: %s", p.file, p.line, p.path, p.text)
}

// joined is all problems in line order as one error, nil when there are none.
func joined(problems []*problem) error {
	slices.SortStableFunc(problems, func(a, b *problem) int { return a.line - b.line })
	errs := make([]error, 0, min(len(problems), maxProblems)+1)
	for i, p := range problems {
		if i == maxProblems {
			errs = append(errs, fmt.Errorf("%s: and %d more", p.file, len(problems)-i))
			break
		}
		errs = append(errs, p)
	}
	return errors.Join(errs...)
}

// builder turns the parser's tree into nodes.
type builder struct {
	file     string
	anchors  map[string]*node
	full     bool // maxNodes was passed
	problems []*problem
}

// parse reads one YAML (or JSON) document; an empty one is a null node.
func parse(file string, data []byte) (*node, []*problem) {
	b := &builder{file: file, anchors: map[string]*node{}}
	if len(data) > MaxFileBytes {
		b.add(1, "", "the file has %d bytes, at most %d are allowed", len(data), MaxFileBytes)
		return nil, b.problems
	}
	if json.Valid(data) {
		return b.buildJSON(data), b.problems
	}
	if b.refuseSlow(data); len(b.problems) > 0 {
		return nil, b.problems
	}
	tokens := lexer.Tokenize(string(data))
	if b.refuseDeep(tokens); len(b.problems) > 0 {
		return nil, b.problems
	}
	// The parser stops at the first duplicate key; build finds them all.
	f, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		line, text := 1, err.Error()
		if e, ok := errors.AsType[yaml.Error](err); ok {
			text = e.GetMessage()
			if t := e.GetToken(); t != nil && t.Position != nil {
				line = t.Position.Line
			}
		}
		b.add(line, "", "%s", text)
		return nil, b.problems
	}
	root := &node{line: 1, size: 1}
	for i, doc := range f.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.DirectiveType {
			continue
		}
		if i > 0 && root.kind != kindNull {
			b.add(lineOf(doc.Body), "", "a second document; only one is allowed")
			break
		}
		root = b.build(doc.Body, "")
	}
	return root, b.problems
}

func (b *builder) add(line int, path, format string, args ...any) {
	b.problems = append(b.problems, &problem{file: b.file, line: line, path: path, text: fmt.Sprintf(format, args...)})
}

// lineOf is the line of n's first token, 1 when the parser lost it.
func lineOf(n ast.Node) int {
	if t := n.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 1
}

func (b *builder) build(n ast.Node, path string) *node {
	out := &node{line: 1, size: 1}
	if n == nil {
		return out
	}
	out.line = lineOf(n)
	switch n := n.(type) {
	case *ast.NullNode:
	case *ast.AnchorNode:
		out = b.build(n.Value, path)
		name := n.Name.GetToken().Value
		if b.anchors[name] != nil {
			b.add(out.line, path, "anchor %q is defined twice", name)
		}
		b.anchors[name] = out
	case *ast.AliasNode:
		name := n.Value.GetToken().Value
		if b.anchors[name] == nil {
			b.add(out.line, path, "unknown anchor %q", name)
			return out
		}
		return b.anchors[name]
	case *ast.SequenceNode:
		out.kind = kindList
		for i, item := range n.Values {
			out.items = append(out.items, b.grow(out, b.build(item, fmt.Sprintf("%s[%d]", path, i)), path))
		}
	case ast.MapNode:
		b.buildMapping(n, out, path)
	default:
		b.buildScalar(n, out, path)
	}
	return out
}

// grow counts child below parent and refuses what aliases blow up.
func (b *builder) grow(parent, child *node, path string) *node {
	if parent.size += child.size; parent.size <= maxNodes && !b.full {
		return child
	}
	if !b.full {
		b.add(parent.line, path, "more than %d values with aliases expanded", maxNodes)
	}
	b.full, parent.size = true, 1
	return &node{line: parent.line, size: 1}
}

func (b *builder) buildMapping(n ast.MapNode, out *node, path string) {
	out.kind = kindMapping
	var merges []*node
	seen := map[string]int{}
	for it := n.MapRange(); it.Next(); {
		if _, ok := it.Key().(*ast.MergeKeyNode); ok {
			merges = append(merges, b.build(it.Value(), path))
			continue
		}
		k, ok := b.keyName(it.Key(), path)
		if !ok {
			continue
		}
		below := join(path, k.name)
		child := b.build(it.Value(), below)
		if first := seen[k.name]; first > 0 {
			b.add(k.line, below, "key appears twice, first at line %d", first)
			continue
		}
		seen[k.name] = k.line
		out.keys = append(out.keys, k)
		out.items = append(out.items, b.grow(out, child, path))
	}
	for _, m := range merges {
		b.merge(out, m, seen, path)
	}
}

// merge adds the keys of a `<<` value that are not there yet.
func (b *builder) merge(out, from *node, seen map[string]int, path string) {
	switch from.kind {
	case kindList:
		for _, item := range from.items {
			if item.kind == kindMapping {
				b.merge(out, item, seen, path)
				continue
			}
			b.add(from.line, path, "<< takes a mapping or a list of mappings")
		}
	case kindMapping:
		for i, k := range from.keys {
			if seen[k.name] == 0 {
				seen[k.name] = k.line
				out.keys = append(out.keys, k)
				out.items = append(out.items, b.grow(out, from.items[i], path))
			}
		}
	default:
		b.add(from.line, path, "<< takes a mapping or a list of mappings")
	}
}

func (b *builder) keyName(n ast.MapKeyNode, path string) (key, bool) {
	switch n.(type) {
	case *ast.StringNode, *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return key{name: n.GetToken().Value, line: lineOf(n)}, true
	default:
		b.add(lineOf(n), path, "a key must be plain text")
		return key{}, false
	}
}

func (b *builder) buildScalar(n ast.Node, out *node, path string) {
	out.kind = kindScalar
	switch n := n.(type) {
	case *ast.StringNode:
		out.value = n.Value
	case *ast.LiteralNode:
		out.value = n.Value.Value
	case *ast.IntegerNode:
		out.value = n.Value // int64 or uint64
	case *ast.FloatNode:
		out.value = n.Value
	case *ast.BoolNode:
		out.value = n.Value
	case *ast.InfinityNode:
		out.value = n.Value
	case *ast.NanNode:
		out.value = math.NaN()
	case *ast.TagNode:
		scalar, ok := n.Value.(ast.ScalarNode)
		if n.Start.Value != "!!str" || !ok {
			b.add(out.line, path, "tag %s is not supported", n.Start.Value)
			out.kind = kindNull
			return
		}
		out.value = scalar.GetToken().Value
	default:
		b.add(out.line, path, "%s is not supported here", n.Type())
		out.kind = kindNull
	}
}
