// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
)

// Resolved is the whole file with defaults applied, in the order of the struct fields, as Load accepts it again.
// Plugin parameters stand as they were written: only the plugins know their defaults.
func (c *Config) Resolved() ([]byte, error) {
	out, err := yaml.MarshalWithOptions(resolve(reflect.ValueOf(c).Elem(), ""), yaml.IndentSequence(false))
	if err != nil {
		return nil, fmt.Errorf("resolved configuration: %w", err)
	}
	return out, nil
}

// resolve is decode turned round: Go values to ordered YAML. opts are those of the struct field that v is.
func resolve(v reflect.Value, opts string) any {
	switch x := v.Interface().(type) {
	case Parameters:
		if x.Absent() {
			return nil
		}
		return ordered(x.root)
	case time.Duration:
		return formatDuration(x)
	case map[string]string:
		if s, ok := x[""]; ok && len(x) == 1 && strings.Contains(opts, "orstring") {
			return s
		}
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return resolve(v.Elem(), opts)
	case reflect.Struct:
		return resolveStruct(v)
	case reflect.Slice:
		out := make([]any, v.Len())
		for i := range out {
			out[i] = resolve(v.Index(i), "")
		}
		return out
	case reflect.Map:
		m, _ := reflect.TypeAssert[map[string]string](v)
		out := yaml.MapSlice{}
		for _, k := range slices.Sorted(maps.Keys(m)) {
			out = append(out, yaml.MapItem{Key: k, Value: m[k]})
		}
		return out
	default:
		if strings.Contains(opts, "auto") && v.Int() == 0 {
			return "auto"
		}
		if strings.Contains(opts, "quantity") {
			return formatQuantity(v.Int())
		}
		return v.Interface()
	}
}

func resolveStruct(v reflect.Value) any {
	out := yaml.MapSlice{}
	for _, f := range fieldsOf(v.Type()) {
		fv := v.FieldByIndex(f.index)
		value := resolve(fv, f.opts)
		if strings.Contains(f.opts, "omitempty") && (value == nil || fv.IsZero()) {
			continue
		}
		out = append(out, yaml.MapItem{Key: f.name, Value: value})
	}
	return out
}

// ordered is plain with mappings in file order.
func ordered(n *node) any {
	switch n.kind {
	case kindList:
		out := make([]any, len(n.items))
		for i, item := range n.items {
			out[i] = ordered(item)
		}
		return out
	case kindMapping:
		out := make(yaml.MapSlice, len(n.keys))
		for i, k := range n.keys {
			out[i] = yaml.MapItem{Key: k.name, Value: ordered(n.items[i])}
		}
		return out
	default:
		return n.value
	}
}
