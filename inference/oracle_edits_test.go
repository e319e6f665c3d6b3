// SPDX-License-Identifier: Apache-2.0

package inference

import "slices"

// An editor lists an object's members as they should be after edits: raw key, raw value. Objects in which transfer
// fields are looked for are listed member by member.
type editor struct {
	body  []byte
	strip bool
	ops   []operation
	spans []spanOperation
}

// covered returns what was put in place of a value.
func (e editor) covered(v *node) (string, bool) {
	for _, o := range slices.Backward(e.spans) {
		if o.name == "" && o.start == v.start && o.end == v.end {
			return o.value, true
		}
	}
	return "", false
}

// raw is a value with what was changed in it.
func (e editor) raw(v *node) string {
	if value, ok := e.covered(v); ok {
		return value
	}
	out, at := []byte(nil), v.start
	for _, o := range e.spans {
		if o.name != "" && o.start == v.start {
			out, at = []byte(`{"`+o.name+`":`+o.value+","), v.start+1
		}
	}
	for _, inner := range v.vals {
		out = append(append(out, e.body[at:inner.start]...), e.raw(inner)...)
		at = inner.end
	}
	return string(append(out, e.body[at:v.end]...))
}

// last returns what the last operation on a field does.
func (e editor) last(sampling bool, name string) (operation, bool) {
	for _, o := range slices.Backward(e.ops) {
		if o.sampling == sampling && o.name == name {
			return o, true
		}
	}
	return operation{}, false
}

func (e editor) top(n *node) []string {
	if n.kind != '{' {
		return []string{string(e.body)}
	}
	ops := e
	if s := n.get("sampling_params"); s.null() {
		if value := e.fresh(); value != "" {
			if _, ok := e.last(false, "sampling_params"); !ok {
				ops.ops = append(slices.Clone(e.ops), operation{name: "sampling_params", value: value})
			}
		}
	}
	return ops.members(n, 0, true)
}

// fresh is the sampling_params made of nothing but what is set in it.
func (e editor) fresh() string {
	members := ""
	var done []string
	for _, o := range e.ops {
		if !o.sampling || slices.Contains(done, o.name) {
			continue
		}
		done = append(done, o.name)
		if last, _ := e.last(true, o.name); last.value != "" {
			if members != "" {
				members += ","
			}
			members += `"` + o.name + `":` + last.value
		}
	}
	if members == "" {
		return ""
	}
	return "{" + members + "}"
}

// members lists an object: level 0 is the top, 1 sampling_params, 2 extra_args. Only the last duplicate is editable.
func (e editor) members(n *node, level int, editable bool) []string {
	out := []string{}
	var there []string
	for i, key := range n.keys {
		o, ok := e.last(level == 1, key)
		ok = ok && editable && level < 2
		v := n.vals[i]
		there = append(there, key)
		raw := string(e.body[n.keyAt[i] : n.keyAt[i]+len(quoteLike(e.body[n.keyAt[i]:]))])
		switch {
		case ok && (o.value == "" || !n.counts(i)), !ok && e.strip && isRouterField(key):
		case ok:
			out = append(append(out, raw), inserted(key, o.value, level)...)
		case level == 0 && key == "sampling_params":
			out = append(out, raw)
			out = append(out, e.nested(v, 1, n.counts(i))...)
		case level < 2 && (key == "extra_args" || key == "vllm_xargs"):
			out = append(out, raw)
			out = append(out, e.nested(v, 2, false)...)
		default:
			out = append(out, raw, e.raw(v))
		}
	}
	for _, o := range e.ops {
		if !editable || level > 1 || o.sampling != (level == 1) || slices.Contains(there, o.name) {
			continue
		}
		there = append(there, o.name)
		if last, _ := e.last(o.sampling, o.name); last.value != "" {
			out = append(append(out, `"`+o.name+`"`), inserted(o.name, last.value, level)...)
		}
	}
	return out
}

// inserted lists a value that was set, as it will be listed when it is read back.
func inserted(key, value string, level int) []string {
	inner := editor{body: []byte(value)}
	switch {
	case level == 0 && key == "sampling_params":
		return inner.nested(oracle(inner.body), 1, false)
	case key == "extra_args" || key == "vllm_xargs":
		return inner.nested(oracle(inner.body), 2, false)
	}
	return []string{value}
}

func (e editor) nested(v *node, level int, editable bool) []string {
	if value, ok := e.covered(v); ok {
		inner := editor{body: []byte(value)}
		return inner.nested(oracle(inner.body), level, false)
	}
	switch {
	case v.kind == '{':
		return append(append([]string{"{"}, e.members(v, level, editable)...), "}")
	case v.kind == '[' && level == 1:
		out := []string{"["}
		for _, item := range v.vals {
			out = append(out, e.nested(item, 1, false)...)
		}
		return append(out, "]")
	}
	return []string{e.raw(v)}
}

// quoteLike returns the JSON string that b begins with.
func quoteLike(b []byte) []byte {
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return b[:i+1]
		}
	}
	return b
}
