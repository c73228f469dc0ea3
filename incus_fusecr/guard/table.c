// SPDX-License-Identifier: Apache-2.0
#include "table.h"

#include <stdlib.h>
#include <sys/random.h>

#include "log.h"

#define BITS_MIN 4

void *must_alloc(size_t size)
{
	return must_realloc(NULL, size);
}

void *must_realloc(void *old, size_t size)
{
	void *memory = realloc(old, size);

	if (!memory)
		die("no memory for %zu bytes", size);
	return memory;
}

static uint64_t secret(void)
{
	static uint64_t value;

	if (!value) {
		if (getrandom(&value, sizeof(value), GRND_NONBLOCK) != sizeof(value))
			value = 0x9e3779b97f4a7c15ULL;
		value |= 1;
	}
	return value;
}

static uint64_t mix(uint64_t value)
{
	value *= secret();
	value ^= value >> 32;
	return value * 0x9e3779b97f4a7c15ULL;
}

uint64_t hash_bytes(uint64_t start, const void *bytes, size_t size)
{
	const unsigned char *at = bytes;
	uint64_t hash = mix(start ^ secret());

	while (size-- > 0)
		hash = (hash ^ *at++) * 0x100000001b3ULL;
	return mix(hash);
}

static struct link **bucket(const struct table *table, uint64_t key)
{
	return &table->buckets[mix(key) >> (64 - table->bits)];
}

size_t table_size(const struct table *table)
{
	return table->bits ? (size_t)1 << table->bits : 0;
}

static void resize(struct table *table, unsigned int bits)
{
	struct table old = *table;
	size_t i;

	table->bits = bits;
	table->buckets = calloc((size_t)1 << bits, sizeof(*table->buckets));
	if (!table->buckets)
		die("no memory for a table of %zu entries", table->count);
	for (i = 0; i < table_size(&old); i++) {
		struct link *link = old.buckets[i], *next, **to;

		for (; link; link = next) {
			next = link->next;
			to = bucket(table, link->key);
			link->next = *to;
			*to = link;
		}
	}
	free(old.buckets);
}

void table_add(struct table *table, struct link *link, uint64_t key)
{
	struct link **to;

	if (!table->bits)
		resize(table, BITS_MIN);
	else if (table->count >= table_size(table))
		resize(table, table->bits + 1);
	link->key = key;
	to = bucket(table, key);
	link->next = *to;
	*to = link;
	table->count++;
}

void table_remove(struct table *table, struct link *link)
{
	struct link **at = bucket(table, link->key);

	while (*at != link)
		at = &(*at)->next;
	*at = link->next;
	table->count--;
	/* after a storm of look-ups and forgets the memory goes back */
	if (table->bits > BITS_MIN && table->count < table_size(table) / 8)
		resize(table, table->bits - 2 > BITS_MIN ? table->bits - 2 : BITS_MIN);
}

struct link *table_find(const struct table *table, uint64_t key)
{
	struct link *link = table->bits ? *bucket(table, key) : NULL;

	while (link && link->key != key)
		link = link->next;
	return link;
}

struct link *table_again(const struct link *link)
{
	uint64_t key = link->key;
	struct link *next = link->next;

	while (next && next->key != key)
		next = next->next;
	return next;
}
