// SPDX-License-Identifier: GPL-2.0-only
/*
 * poolskip.ko, the part that only C can do: what the kernel offers as macros, inline functions, or structures whose layout
 * changes between kernels; page tables are in walk.c. Nothing is decided here; see src/lib.rs for that. The mutex below makes
 * the core single-threaded.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <xen/xen.h>
#include <xen/xenbus.h>
#include <asm/xen/hypercall.h>
#include "shim.h"

#define DIRECTORY "data/poolskip"	/* enlightenment::xenstore::DIRECTORY */

static DEFINE_MUTEX(lock);
static DECLARE_WAIT_QUEUE_HEAD(request_came);
static bool request_waits;
static atomic_t openers = ATOMIC_INIT(0);

/* alloc_page is a macro. RETRY_MAYFAIL: rather no list than an OOM kill. PFN 0 is never given out. */
u64 shim_page_allocate(void)
{
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN | __GFP_RETRY_MAYFAIL);
	return page ? page_to_pfn(page) : 0;
}

/* pfn_to_page and __free_page are macros. */
void shim_page_free(u64 pfn)
{
	__free_page(pfn_to_page(pfn));
}

/* page_address is a macro. */
void *shim_page_address(u64 pfn)
{
	return page_address(pfn_to_page(pfn));
}

/* smp_store_release is a macro; virt_: the reader is another domain, so also where this kernel has one processor. */
void shim_store_release(u64 *to, u64 value)
{
	virt_store_release(to, value);
}

/* copy_from_user is inline. */
int shim_copy_from_user(void *to, u64 from, size_t length)
{
	return copy_from_user(to, (const void __user *)from, length) ? -EFAULT : 0;
}

/* copy_to_user is inline. */
int shim_copy_to_user(u64 to, const void *from, size_t length)
{
	return copy_to_user((void __user *)to, from, length) ? -EFAULT : 0;
}

/* put_task_struct is inline; NULL when there is no such process, or it has no memory. */
struct mm_struct *shim_mm_get(int number)
{
	struct pid *pid = find_get_pid(number);
	struct task_struct *task = get_pid_task(pid, PIDTYPE_PID);
	struct mm_struct *mm = NULL;
	put_pid(pid);
	if (task) {
		mm = get_task_mm(task);
		put_task_struct(task);
	}
	return mm;
}

/* struct xenbus_transaction is passed by value. */
int shim_xenstore_write(const char *node, const char *value)
{
	return xenbus_write(XBT_NIL, DIRECTORY, node, value);
}

/* The value is allocated, and errors come as pointers. */
long shim_xenstore_read(const char *node, char *to, size_t room)
{
	unsigned int length;
	char *value = xenbus_read(XBT_NIL, DIRECTORY, node, &length);
	if (IS_ERR(value))
		return PTR_ERR(value);
	memcpy(to, value, min_t(size_t, length, room));
	kfree(value);
	return length;
}

/* struct xenbus_transaction is passed by value. */
int shim_xenstore_remove(void)
{
	return xenbus_rm(XBT_NIL, DIRECTORY, "");
}

/* Hypercalls are inline. */
int shim_event_channel_op(int operation, void *argument)
{
	return HYPERVISOR_event_channel_op(operation, argument);
}

static int device_open(struct inode *inode, struct file *file)
{
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (atomic_cmpxchg(&openers, 0, 1))
		return -EBUSY;
	return nonseekable_open(inode, file);
}

static int device_release(struct inode *inode, struct file *file)
{
	mutex_lock(&lock);
	poolskip_close();
	mutex_unlock(&lock);
	atomic_set(&openers, 0);
	return 0;
}

static long device_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	long result;
	if (mutex_lock_interruptible(&lock))
		return -ERESTARTSYS;
	result = poolskip_ioctl(command, argument);
	mutex_unlock(&lock);
	return result;
}

static ssize_t device_read(struct file *file, char __user *to, size_t room, loff_t *position)
{
	bool more = false;
	ssize_t result;

	for (;;) {
		if (mutex_lock_interruptible(&lock))
			return -ERESTARTSYS;
		result = poolskip_read((u64)to, room, &more);
		WRITE_ONCE(request_waits, more);
		mutex_unlock(&lock);
		if (result != -EAGAIN || file->f_flags & O_NONBLOCK)
			return result;
		if (wait_event_interruptible(request_came, READ_ONCE(request_waits)))
			return -ERESTARTSYS;
	}
}

static __poll_t device_poll(struct file *file, poll_table *table)
{
	poll_wait(file, &request_came, table);
	return READ_ONCE(request_waits) ? EPOLLIN | EPOLLRDNORM : 0;
}

static const struct file_operations operations = {
	.owner = THIS_MODULE,
	.open = device_open,
	.release = device_release,
	.unlocked_ioctl = device_ioctl,
	.read = device_read,
	.poll = device_poll,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR, .name = "poolskip", .fops = &operations, .mode = 0600,
};

/* Runs in the xenwatch thread, which may sleep. */
static void fired(struct xenbus_watch *watch, const char *path, const char *token)
{
	mutex_lock(&lock);
	WRITE_ONCE(request_waits, poolskip_watch_fired());
	mutex_unlock(&lock);
	wake_up_interruptible(&request_came);
}

static struct xenbus_watch watch = { .node = DIRECTORY "/request", .callback = fired };

static int __init poolskip_init(void)
{
	long error = poolskip_start(xen_domain());
	if (error)
		return error;
	if (xen_domain()) {
		if (!poolskip_is_announced())
			pr_warn("no xenstore node or event channel could be made: dom0 cannot find the lists\n");
		error = register_xenbus_watch(&watch);
		if (error)
			goto stop;
	}
	/* Last: from here on the device may be opened. */
	error = misc_register(&device);
	if (!error)
		return 0;
	if (xen_domain())
		unregister_xenbus_watch(&watch);
stop:
	poolskip_stop();
	return error;
}

static void __exit poolskip_exit(void)
{
	misc_deregister(&device);
	if (xen_domain())
		unregister_xenbus_watch(&watch);
	poolskip_stop();
}

module_init(poolskip_init);
module_exit(poolskip_exit);
MODULE_LICENSE("GPL");
MODULE_AUTHOR("Poolskip");
MODULE_DESCRIPTION("Tells dom0 which guest pages hold pages of a database that also lie on storage");
MODULE_VERSION("0.1.0");
