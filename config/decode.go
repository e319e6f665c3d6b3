// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// decoder writes a tree strictly over Go values, which hold the defaults, and collects every problem. Null leaves a
// default as it is; a list or a mapping to a Go map replaces it whole.
type decoder struct {
	file     string
	problems []*problem
	lines    map[string]int // path → line of its key or item
}

// beginner is an element of a list that has defaults or wants its line.
type beginner interface{ begin(line int) }

func (d *decoder) add(line int, path, format string, args ...any) {
	d.problems = append(d.problems, &problem{file: d.file, line: line, path: path, text: fmt.Sprintf(format, args...)})
}

// join appends a key to a path, quoted where it would be unclear.
func join(path, name string) string {
	if strings.ContainsAny(name, ".[]/ :\"") || name == "" {
		return path + "[" + strconv.Quote(name) + "]"
	}
	if path == "" {
		return name
	}
	return path + "." + name
}

// field is one settable key of a struct. opts are the words behind the name in its tag: quantity (a Kubernetes
// quantity), auto (the word auto means 0), orstring (a string means the map {"": string}).
type field struct {
	name  string
	opts  string
	index []int
}

// fieldsOf lists a struct's keys: the yaml tag, else the json tag, else the Go name with a small first letter.
func fieldsOf(t reflect.Type) []field {
	var out []field
	for f := range t.Fields() {
		tag := f.Tag.Get("yaml")
		if tag == "" {
			tag = f.Tag.Get("json")
		}
		name, opts, _ := strings.Cut(tag, ",")
		switch {
		case name == "-":
			continue
		case f.Anonymous && name == "" && f.Type.Kind() == reflect.Struct:
			for _, inner := range fieldsOf(f.Type) {
				inner.index = append(slices.Clone(f.Index), inner.index...)
				out = append(out, inner)
			}
			continue
		case !f.IsExported():
			continue
		case name == "":
			name = strings.ToLower(f.Name[:1]) + f.Name[1:]
		}
		out = append(out, field{name: name, opts: opts, index: f.Index})
	}
	return out
}

// decode writes n into v. opts are those of the struct field that v is.
func (d *decoder) decode(n *node, v reflect.Value, path, opts string) {
	if n.kind == kindNull {
		return
	}
	if v.Type() == reflect.TypeFor[Parameters]() {
		v.Set(reflect.ValueOf(Parameters{file: d.file, path: path, root: n}))
		return
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		if b, ok := reflect.TypeAssert[beginner](v); ok {
			b.begin(n.line)
		}
		d.decode(n, v.Elem(), path, opts)
		return
	}
	switch v.Kind() {
	case reflect.Interface:
		if v.NumMethod() > 0 {
			d.add(n.line, path, "type %s cannot be configured", v.Type())
			return
		}
		v.Set(reflect.ValueOf(plain(n)))
	case reflect.Struct:
		if u, ok := reflect.TypeAssert[encoding.TextUnmarshaler](v.Addr()); ok {
			d.decodeText(n, u, path)
			return
		}
		d.decodeStruct(n, v, path)
	case reflect.Slice:
		d.decodeSlice(n, v, path, opts)
	case reflect.Map:
		d.decodeMap(n, v, path, opts)
	default:
		d.decodeScalar(n, v, path, opts)
	}
}

func (d *decoder) decodeText(n *node, u encoding.TextUnmarshaler, path string) {
	s, ok := n.value.(string)
	if !ok {
		d.add(n.line, path, "must be a string, is %s", describe(n))
		return
	}
	if err := u.UnmarshalText([]byte(s)); err != nil {
		d.add(n.line, path, "%q: %v", s, err)
	}
}

func (d *decoder) decodeStruct(n *node, v reflect.Value, path string) {
	if n.kind != kindMapping {
		d.add(n.line, path, "must be a mapping, is %s", describe(n))
		return
	}
	fields := fieldsOf(v.Type())
	for i, k := range n.keys {
		below := join(path, k.name)
		d.lines[below] = k.line
		at := slices.IndexFunc(fields, func(f field) bool { return f.name == k.name })
		if at < 0 {
			known := make([]string, len(fields))
			for i, f := range fields {
				known[i] = f.name
			}
			d.add(k.line, below, "unknown key, known here: %s", strings.Join(known, ", "))
			continue
		}
		d.decode(n.items[i], v.FieldByIndex(fields[at].index), below, fields[at].opts)
	}
}

func (d *decoder) decodeSlice(n *node, v reflect.Value, path, opts string) {
	if n.kind != kindList {
		d.add(n.line, path, "must be a list, is %s", describe(n))
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.items), len(n.items))
	for i, item := range n.items {
		below := fmt.Sprintf("%s[%d]", path, i)
		d.lines[below] = item.line
		el := out.Index(i)
		if b, ok := reflect.TypeAssert[beginner](el.Addr()); ok {
			b.begin(item.line)
		}
		if item.kind == kindNull && el.Kind() != reflect.Interface {
			d.add(item.line, below, "is empty")
		}
		d.decode(item, el, below, opts)
	}
	v.Set(out)
}

func (d *decoder) decodeMap(n *node, v reflect.Value, path, opts string) {
	t := v.Type()
	if t.Key().Kind() != reflect.String {
		d.add(n.line, path, "type %s cannot be configured", t)
		return
	}
	if s, ok := n.value.(string); ok && strings.Contains(opts, "orstring") {
		v.Set(reflect.ValueOf(map[string]string{"": s}))
		return
	}
	if n.kind != kindMapping {
		want := "a mapping"
		if strings.Contains(opts, "orstring") {
			want = "a name or a mapping"
		}
		d.add(n.line, path, "must be %s, is %s", want, describe(n))
		return
	}
	out := reflect.MakeMapWithSize(t, len(n.keys))
	for i, k := range n.keys {
		below := join(path, k.name)
		d.lines[below] = k.line
		el := reflect.New(t.Elem()).Elem()
		d.decode(n.items[i], el, below, opts)
		out.SetMapIndex(reflect.ValueOf(k.name).Convert(t.Key()), el)
	}
	v.Set(out)
}

func (d *decoder) decodeScalar(n *node, v reflect.Value, path, opts string) {
	if n.kind != kindScalar {
		d.add(n.line, path, "must be %s, is %s", wanted(v.Type(), opts), describe(n))
		return
	}
	if err := setScalar(n.value, v, opts); err != nil {
		d.add(n.line, path, "%v", err)
	}
}

// setScalar converts without rounding, clamping or guessing.
func setScalar(value any, v reflect.Value, opts string) error {
	var ok bool
	rv := reflect.ValueOf(value)
	switch {
	case v.Type() == reflect.TypeFor[time.Duration]():
		dur, err := time.ParseDuration(fmt.Sprint(value))
		if ok = err == nil; ok {
			v.SetInt(int64(dur))
		}
	case strings.Contains(opts, "quantity"):
		var q int64
		if q, ok = parseQuantity(fmt.Sprint(value)); !ok {
			ok = value == "auto" && strings.Contains(opts, "auto")
		}
		v.SetInt(q)
	case v.Kind() == reflect.String || v.Kind() == reflect.Bool:
		if ok = rv.Kind() == v.Kind(); ok {
			v.Set(rv.Convert(v.Type()))
		}
	case v.CanFloat():
		if ok = rv.CanFloat() || rv.CanInt() || rv.CanUint(); ok {
			f := rv.Convert(reflect.TypeFor[float64]()).Float()
			ok = !math.IsNaN(f) && !math.IsInf(f, 0) && !v.OverflowFloat(f)
			v.SetFloat(f)
		}
	case v.CanInt() || v.CanUint():
		ok = setWhole(rv, v)
	default:
		return fmt.Errorf("type %s cannot be configured", v.Type())
	}
	if !ok {
		return fmt.Errorf("must be %s, is %s", wanted(v.Type(), opts), show(value))
	}
	return nil
}

// setWhole sets an integer of any kind, if value is one and fits.
func setWhole(value, v reflect.Value) bool {
	switch {
	case v.CanInt():
		if value.CanUint() && value.Uint() <= math.MaxInt64 {
			value = value.Convert(reflect.TypeFor[int64]())
		}
		if !value.CanInt() || v.OverflowInt(value.Int()) {
			return false
		}
		v.SetInt(value.Int())
	default:
		if value.CanInt() && value.Int() >= 0 {
			value = value.Convert(reflect.TypeFor[uint64]())
		}
		if !value.CanUint() || v.OverflowUint(value.Uint()) {
			return false
		}
		v.SetUint(value.Uint())
	}
	return true
}
