// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
)

// jsonBuilder turns valid JSON into nodes: the YAML parser reads JSON too, but slowly where it stands on one line.
type jsonBuilder struct {
	*builder
	dec   *json.Decoder
	data  []byte
	line  int
	since int64 // offset up to which lines are counted
}

func (b *builder) buildJSON(data []byte) *node {
	j := &jsonBuilder{builder: b, dec: json.NewDecoder(bytes.NewReader(data)), data: data, line: 1}
	j.dec.UseNumber()
	return j.next("", 0)
}

// token reads one token and counts lines up to its end; data is known to be valid.
func (j *jsonBuilder) token() json.Token {
	t, err := j.dec.Token()
	if err != nil {
		return nil
	}
	at := j.dec.InputOffset()
	j.line += bytes.Count(j.data[j.since:at], []byte("\n"))
	j.since = at
	return t
}

func (j *jsonBuilder) next(path string, depth int) *node {
	t := j.token()
	out := &node{line: j.line, size: 1, kind: kindScalar}
	if depth > maxDepth {
		j.add(j.line, path, "nested too deeply")
	}
	switch t := t.(type) {
	case nil:
		out.kind = kindNull
	case json.Delim:
		out.kind = kindList
		if t == '{' {
			out.kind = kindMapping
		}
		j.fill(out, path, depth)
	case json.Number:
		out.value = number(t.String())
	default:
		out.value = t
	}
	return out
}

// fill reads the members of an object or array up to its end.
func (j *jsonBuilder) fill(out *node, path string, depth int) {
	first := map[string]int{}
	for i := 0; j.dec.More() && depth <= maxDepth; i++ {
		below := fmt.Sprintf("%s[%d]", path, i)
		if out.kind == kindList {
			out.items = append(out.items, j.grow(out, j.next(below, depth+1), path))
			continue
		}
		name, _ := j.token().(string)
		k := key{name: name, line: j.line}
		below = join(path, name)
		child := j.next(below, depth+1)
		if at := first[name]; at > 0 {
			j.add(k.line, below, "key appears twice, first at line %d", at)
			continue
		}
		first[name] = k.line
		out.keys = append(out.keys, k)
		out.items = append(out.items, j.grow(out, child, path))
	}
	if depth <= maxDepth {
		j.token()
	}
}

// number keeps whole numbers exact, as the YAML parser does.
func number(s string) any {
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		return n
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return math.Inf(1)
	}
	return f
}
